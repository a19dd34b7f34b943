"""Tiny real models, a tiny tokenizer and saved checkpoints, for all tests.

Runtime shape checks are on: what jaxtyping says in a signature of ``analyzers`` is enforced by beartype.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook
from s3_support import SECRET, Bucket
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

install_import_hook("analyzers", "shape_checks.checked")
# On a busy machine, or at a first import, an example takes long: that says nothing of the code.
settings.register_profile("patient", settings(), deadline=None, suppress_health_check=(HealthCheck.too_slow,))
settings.load_profile("patient")

VOCABULARY = 257

MakeModel = Callable[..., GPTNeoXForCausalLM]
SaveCheckpoint = Callable[[Path, Any, Any], Path]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for numerical libraries, here and in the tests' own processes.

    The tensors are tiny, and on a busy machine threads that wait for one another took ten times as long.
    """
    torch.set_num_threads(1)
    with threadpool_limits(1), pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(name, "1")
        yield


def shake(model: Any) -> Any:
    """Move biases and the gains of norms off 0 and 1, so that a test notices where they are lost."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_neox() -> MakeModel:
    """``tiny_neox(dtype=torch.float32)``: a random GPT-NeoX, one per dtype and session: do not change it.

    Width 128, 3 layers of 4 heads, 257 tokens, at most 64 positions. Weights are the same in every dtype, up
    to rounding.
    """

    @cache
    def make(dtype: torch.dtype = torch.float32) -> GPTNeoXForCausalLM:
        config = GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=192,
            max_position_embeddings=64,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return shake(GPTNeoXForCausalLM(config)).to(dtype)

    return make


@pytest.fixture(scope="session")
def tiny_tokens() -> torch.Tensor:
    """Eight random sequences of 40 tokens for the tiny models: ``[8, 40]``, int64."""
    return torch.randint(0, VOCABULARY, (8, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 257 entries: the 256 bytes, then ``<|endoftext|>`` (BOS and EOS)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def save_checkpoint() -> SaveCheckpoint:
    """``save_checkpoint(folder, model, tokenizer)``: write an HF-format checkpoint; return the folder.

    Config, one safetensors file, and the tokenizer's files unless it is None.
    """

    def save(folder: Path, model: Any, tokenizer: Any) -> Path:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def bucket() -> Iterator[Bucket]:
    """An empty bucket on moto's S3 server; this process reaches it too."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="ontogeny-tests")
        yield Bucket("s3://ontogeny-tests", environment)
    server.stop()
