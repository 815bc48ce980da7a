"""What a CPU takes: the parts by hand, the cache as it is allocated, the whole against a process."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.cpu_memory import RUNTIME_BYTES, PackedMatrix, cpu_memory
from gemma_deploy.graph_spec import CACHE_DTYPE_BYTES
from gemma_deploy.inspection import inspect_folder
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession

# Python and its packages as `generate` has them, with what a bundle's tiny weights take.
LOADED = """
import re, sys
from pathlib import Path
import gemma_deploy
with gemma_deploy.load(sys.argv[1], device="cpu", max_seq_len=64) as model:
    model.generate("abc", max_new_tokens=2)
    print(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


class TestMatrices:
    # 64 x 96 = 6144 weights: 192 blocks of 32, 96 blocks of 64.
    @pytest.mark.parametrize(
        ("dtype", "scheme", "packed", "original", "scattered", "step"),
        [
            ("float32", None, 4 * 6144, 0, 0, 0),  # packed from the mapped file
            ("float16", None, 4 * 6144, 4 * 6144, 0, 0),
            ("bfloat16", None, 4 * 6144, 4 * 6144, 0, 0),
            ("float16", "int4/32", 3072 + 192 * 12, 3072, 768, 0),
            ("float16", "int8/channel", 6144 + 192 * 12, 6144, 1536, 0),
            ("float16", "nf4/64", 96 * 4, 0, 0, 4 * 6144),
            ("float16", "fp8/channel", 4 * 6144, 4 * 6144, 0, 0),
        ],
    )
    def test_by_hand(
        self, dtype: str, scheme: str | None, packed: int, original: int, scattered: int, step: int
    ) -> None:
        weight_format = None if scheme is None else WeightFormat.parse(scheme)

        found = PackedMatrix.of((64, 96), dtype, weight_format)  # type: ignore[arg-type] # of the parameters

        assert found == PackedMatrix(
            packed_bytes=packed, original_bytes=original, scattered_bytes=scattered, step_bytes=step
        )


class TestPeaks:
    MATRICES = (
        PackedMatrix(packed_bytes=100, original_bytes=50, scattered_bytes=9),
        PackedMatrix(packed_bytes=300, original_bytes=20, step_bytes=7),
    )

    def test_one_original_at_a_time(self) -> None:
        found = cpu_memory(self.MATRICES, vocab_size=10, tokenizer_file_bytes=0)

        assert found.weights_bytes == 400 + 7
        assert found.loading_bytes == RUNTIME_BYTES + 400 + 9 + 50
        assert found.prepacked_weights_bytes == 7
        assert found.prepacked_loading_bytes == RUNTIME_BYTES + 300
        assert found.prepacked_writing_bytes == RUNTIME_BYTES + 400 + 70 + 300

    def test_a_tokenizer_grows_with_its_vocabulary_not_beyond_its_file(self) -> None:
        small, large, same = (
            cpu_memory(self.MATRICES, vocab_size=size, tokenizer_file_bytes=file_bytes)
            for size, file_bytes in ((262_144, 1000), (262_144, 33_000_000), (262_144, 66_000_000))
        )

        assert 0 < small.tokenizer_bytes < 20_000
        assert small.tokenizer_bytes < large.tokenizer_bytes == same.tokenizer_bytes
        assert large.loading_bytes < same.loading_bytes


def test_the_cache_is_what_a_session_allocates(bundle: Path) -> None:
    said = inspect_folder(bundle).estimate(batch_size=3, max_seq_len=100, prefill_tokens=512)

    with OnnxRuntimeSession(Bundle.open(bundle)) as session:
        cache = session.new_cache(3, 100)
        allocated = sum(math.prod(x.shape) * CACHE_DTYPE_BYTES[x.dtype] for x in cache.tensors)
        owners = [x.owner for x in cache.tensors]
        arrays = [part for owner in owners for part in owner if isinstance(part, np.ndarray)]  # type: ignore[attr-defined] # the array beside its OrtValue

    assert said.kv_cache_bytes == allocated == sum(x.nbytes for x in arrays)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_what_a_tiny_model_takes_is_mostly_the_runtime(bundle: Path) -> None:
    said = inspect_folder(bundle).estimate(batch_size=1, max_seq_len=64, prefill_tokens=512)

    command = [sys.executable, "-c", LOADED, str(bundle)]
    taken_bytes = 1024 * int(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )

    assert said.cpu_total_bytes == pytest.approx(taken_bytes, rel=0.3)
