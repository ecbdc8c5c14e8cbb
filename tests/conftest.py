"""Seeds, Triton without a GPU, and tiny pipelines with random weights, written by diffusers' own classes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# read when triton is imported, which torch and diffusers may do: its kernels then run on the CPU
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from sana_edge.engines.tensorrt import cuda
from sana_edge.instruction import CHI
from sana_edge.kernels.cuda import library as cuda_library
from sana_edge.store.package import KEY, METHOD

_GUARDED = runpy.run_path(str(Path(__file__).with_name("guarded.py")))["guarded"]
# workers of `pytest -n` share the cores
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(torch.get_num_threads() // WORKERS, 1))

CSRC = Path(__file__).parents[1] / "csrc"
WIDTH = 64
CAPTION_WIDTH = 32
# compute capabilities that the Triton kernels are compiled for: 8.9 always, the others in the slow tests
CAPABILITIES = (80, 86, 89, 90, 120)
CAPTIONS = ("a red house left of a yellow star", "two blue fish above a green tree", "a cat on a mat")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def interpreted() -> None:
    """Triton kernels run in its interpreter, on CPU tensors; import their modules after asking for this."""
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("TRITON_INTERPRET is not 1")


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernels built for the CPU (csrc/emulator), as they are on compute capability 8.9."""
    return _emulate(890, tmp_path_factory)


@pytest.fixture(scope="session")
def turing_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`emulated_library`, as the kernels are on compute capability 7.5."""
    return _emulate(750, tmp_path_factory)


def _emulate(architecture: int, folder: pytest.TempPathFactory) -> Path:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    # SANA_EDGE_EMULATED_FOLDER keeps what was built, for those who run one test file again and again
    kept = os.environ.get("SANA_EDGE_EMULATED_FOLDER")
    place = Path(kept) if kept else folder.mktemp("emulated")
    library = place / f"libsana_edge_emulated_{architecture}.so"
    command = [sys.executable, str(CSRC / "compile.py"), "--emulated", str(architecture)]
    done = subprocess.run([*command, "--output", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture(params=[0, 1, pytest.param(-1, marks=pytest.mark.gpu)], ids=["in order", "shuffled", "gpu"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator | OnGpu]:
    """The CUDA operations of sana_edge.kernels on CPU tensors: emulated in two orders, and on a GPU."""
    if request.param >= 0:
        library = request.getfixturevalue("emulated_library")
        with _emulator(library, request.param, monkeypatch) as emulator:
            emulator.pretend(89, 24, 99 << 10)
            yield emulator
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_gpu = OnGpu(cuda_library.load())
    monkeypatch.setattr(cuda_library, "load", lambda: on_gpu)
    yield on_gpu


@pytest.fixture
def emulated_turing(turing_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """`emulated` for compute capability 7.5, in order."""
    with _emulator(turing_library, 0, monkeypatch) as emulator:
        emulator.pretend(75, 24, 64 << 10)
        yield emulator


@contextlib.contextmanager
def _emulator(library: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    monkeypatch.setenv("SANA_EDGE_CUDA_LIBRARY", str(library))
    cuda_library.load.cache_clear()
    emulator = Emulator(ctypes.CDLL(str(library)))
    emulator.shuffle(seed)
    emulator.count()
    yield emulator
    emulator.shuffle(0)
    cuda_library.load.cache_clear()


@pytest.fixture
def guarded() -> Callable[[torch.Tensor], torch.Tensor]:
    """Copies a tensor to where readable memory ends behind it: see tests/guarded.py."""
    function: Callable[[torch.Tensor], torch.Tensor] = _GUARDED
    return function


@pytest.fixture
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty gives, such as a wrapper's outputs, is NaN, and readable memory ends behind it."""
    empty = torch.empty

    def guarded_empty(*args: Any, **options: Any) -> torch.Tensor:
        found = _GUARDED(empty(*args, **options))
        found.view(torch.uint8).fill_(0xFF)
        return found

    monkeypatch.setattr(torch, "empty", guarded_empty)


class OnGpu:
    """The CUDA library for tensors on the CPU: their memory travels to the GPU and back with every call."""

    device_type = "cpu"

    def __init__(self, library: cuda_library.Library) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        if name in ("count", "pretend", "shuffle"):
            pytest.skip("only the emulator can do this")
        return getattr(self._library, name)

    def call(self, operation: str, device: torch.device, **fields: Any) -> None:
        """`Library.call`; whole storages are copied, so that views, aliases and what lies around stay so."""
        tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in tensors.values()}
        bytes_of = {
            address: torch.empty(0, dtype=torch.uint8).set_(storage) for address, storage in storages.items()
        }
        there = {address: content.cuda() for address, content in bytes_of.items()}
        for name, value in tensors.items():
            offset = value.storage_offset() * value.element_size()
            fields[name] = there[value.untyped_storage().data_ptr()][offset:]
        try:
            self._library.call(operation, torch.device("cuda", torch.cuda.current_device()), **fields)
        finally:
            torch.cuda.synchronize()
            for address, content in bytes_of.items():
                content.copy_(there[address])


class Emulator:
    """What the emulator can be told, and what it counted."""

    NAMES = ("launches", "blocks", "int8_products", "half_products", "matrix_reads", "bank_conflicts")

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def shuffle(self, seed: int) -> None:
        """Run threads and blocks in their order (0), or in another one for every other seed."""
        self._library.sana_edge_emulator_shuffle(seed)

    def pretend(self, capability: int, processors: int, shared_memory: int) -> None:
        """Pretend to be a device: 89, its multiprocessors, and bytes of shared memory of a block."""
        self._library.sana_edge_emulator_device(capability, processors, shared_memory)

    def count(self) -> dict[str, int]:
        """What was done since the last call: see Counters in csrc/emulator/emulator.h."""
        numbers = (ctypes.c_int64 * len(self.NAMES))()
        self._library.sana_edge_emulator_counters(numbers)
        return dict(zip(self.NAMES, numbers, strict=True))


@pytest.fixture(params=[pytest.param(sm, marks=() if sm == 89 else pytest.mark.slow) for sm in CAPABILITIES])
def compiled(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Compiles a Triton kernel ahead of time, for each architecture: "ptx", "sass" and "usage" of its code.

    Args of what is returned:
        name: "w8a8_linear.w8a8_linear_kernel", module and kernel in sana_edge.kernels.triton.
        signature: Triton's types of the arguments that are not constexpr, in their order, "*fp32" or "i32".
        constexprs: values of the others; None stands for an argument that is left out.
        multiples: integer arguments that are known to be multiples of 16, as all pointers are.
        options: of the launch, num_warps and the like.
    """
    pytest.importorskip("triton", reason="triton is not installed")

    def build(
        name: str,
        signature: Mapping[str, str],
        constexprs: Mapping[str, object],
        multiples: Sequence[str] = (),
        **options: object,
    ) -> dict[str, str]:
        module, kernel = name.rsplit(".", 1)
        asked = {
            "module": f"sana_edge.kernels.triton.{module}",
            "kernel": kernel,
            "capability": request.param,
            "signature": signature,
            "constexprs": constexprs,
            "multiples": list(multiples),
            "options": options,
        }
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("compile_kernel.py")],
            input=json.dumps(asked),
            env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "triton")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        code: dict[str, str] = json.loads(done.stdout)
        return code

    return build


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SanaPipeline, native size 128 px, fp32 weights; session-wide: copy it before changing a file."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with _seeded(1):
        pipeline = SanaPipeline(
            tokenizer=tiny_tokenizer(),
            text_encoder=tiny_text_encoder(),
            vae=tiny_autoencoder(),
            transformer=tiny_denoiser(),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def marked_int8(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder that calls itself INT8; its weights are float."""
    folder = tmp_path / "marked-int8"
    shutil.copytree(tiny_folder, folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), KEY: {"quant_method": METHOD}}))
    return folder


@pytest.fixture(scope="session")
def tiny_sprint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SanaSprintPipeline (qk-norm, guidance embedding, SCM), otherwise as `tiny_folder`."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sprint"
    with _seeded(2):
        pipeline = SanaSprintPipeline(
            tokenizer=tiny_tokenizer(),
            text_encoder=tiny_text_encoder(),
            vae=tiny_autoencoder(),
            transformer=tiny_denoiser(qk_norm="rms_norm_across_heads", guidance_embeds=True),
            scheduler=SCMScheduler(),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Gemma's special ids; like the public one it is stored with left padding."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n".join(CHI), *CAPTIONS] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny_text_encoder() -> Gemma2Model:
    """Sliding window shorter than the instruction, and weights large enough for attention to matter."""
    config = Gemma2Config(
        vocab_size=640,
        hidden_size=CAPTION_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=48,
        initializer_range=0.3,
    )
    return Gemma2Model(config)


def tiny_autoencoder() -> AutoencoderDC:
    types = ("ResBlock",) * 5 + ("EfficientViTBlock",)
    channels = (8, 8, 16, 16, 32, 32)
    layers = (0, 1, 1, 1, 1, 1)
    scales: tuple[tuple[int, ...], ...] = ((),) * 5 + ((5,),)
    return AutoencoderDC(
        attention_head_dim=16,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    )


def tiny_denoiser(qk_norm: str | None = None, guidance_embeds: bool = False) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH,
        caption_channels=CAPTION_WIDTH,
        sample_size=4,
        interpolation_scale=None,
        qk_norm=qk_norm,
        guidance_embeds=guidance_embeds,
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, which no test may share; and no NVIDIA driver of the machine's own."""
    monkeypatch.setenv("SANA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "_DRIVER", tmp_path / "no driver")
    return tmp_path / "cache"


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
