"""sana_edge.h as a C program sees it: valid C99, structs laid out as Python gives them, and what is refused.

A program is written for each operation from the structs in `cuda_library` and the limits that the header's
comments name, compiled by a plain C compiler, and linked with the emulated library of the same interface.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sana_edge.kernels.cuda import library as cuda_library
from sana_edge.kernels.cuda import operations

CSRC = Path(__file__).parents[3] / "csrc"
OPERATIONS = sorted(operations.OPERATIONS)
STRICT = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-I", str(CSRC)]
FP32, FP16 = 0, 1
# a small problem for each
PROBLEMS = """
quantize_rows: rows=3 columns=32
norm_modulate_quantize: rows=4 columns=32 tokens=2 stride=32 eps=1e-6f
w8a8_linear: rows=4 columns=16 depth=32 tokens=2 gate_stride=16 constant_stride=16
w8a8_linear_quantize: rows=4 columns=32 depth=32 tokens=2 workspace_bytes=1048576
sampler_step: size=24
qkv_linear_attention: images=1 tokens=4 heads=2 depth=64 workspace_bytes=1048576
qk_norm_linear_attention: images=1 tokens=4 heads=2 norm_eps=1e-6f workspace_bytes=1048576
linear_attention_finish: images=1 tokens=4 heads=2 q_stride=64 eps=1e-6f
cross_attention_quantize: prompts=1 tokens=4 heads=2 head_dim=16 capacity=16 norm_eps=1e-6f
dwconv_glu_quantize: images=1 height=3 width=2 hidden=16
patch_embed: images=1 copies=2 channels=4 height=3 width=2 columns=16
velocity_head: images=1 tokens=4 columns=32 channels=4 stride=32 eps=1e-6f
w8a8_conv2d: images=1 height=3 width=2 depth=16 columns=16 kernel=3 repeats=1 norm_eps=1e-6f
norm_add_quantize: rows=4 columns=32 eps=1e-5f
tensor_scale: rows=3 columns=32 workspace_bytes=1048576
multiscale_linear_attention: images=1 height=3 width=2 heads=2 workspace_bytes=1048576
quantize_digits: rows=3 columns=32
add_norm_digits: rows=3 columns=32 eps=1e-6f
w8a16_linear: rows=4 columns=16 depth=32 tokens=2 pairs=4 rotated=8
soft_capped_attention: prompts=1 tokens=3 heads=2 kv_heads=1 head_dim=16 capacity=4 scale=0.25f cap=50
"""
VALID = {
    name: dict(pair.split("=") for pair in rest.split())
    for name, _, rest in (line.partition(": ") for line in PROBLEMS.strip().splitlines())
}
# with these at 0 there is nothing to do
COUNTS = ("rows", "images", "prompts", "size")
SIZES = {*COUNTS, "tokens", "columns", "depth", "heads", "head_dim", "capacity", "height", "width", "hidden"}
SIZES |= {"channels", "copies", "kernel", "kv_heads"}
# what may be NULL, and is in a problem that has none of what belongs to it
LEFT_OUT = {
    "w8a8_linear_quantize": {"scale", "shift"},
    "w8a8_conv2d": {
        *("norm_weight", "norm_bias", "out_norm_weight", "out_norm_bias", "shortcut", "residual"),
        *("out_scale", "next_scale", "next_values"),
    },
    "multiscale_linear_attention": {"depthwise", "pointwise"},
    "linear_attention_finish": {"roots", "norm_q"},
    "add_norm_digits": {"y", "post_weight"},
}


@dataclass(frozen=True)
class Field:
    """A member of a struct, and what the header says of it."""

    name: str
    kind: str
    comment: str

    @property
    def pointer(self) -> bool:
        return "*" in self.kind

    @property
    def optional(self) -> bool:
        return "may be NULL" in self.comment or "NULL where" in self.comment

    @property
    def matrix(self) -> bool:
        """Whether rows of it are read or written 16 bytes at a time."""
        return self.pointer and ("void" in self.kind or "int8_t" in self.kind) and self.name != "workspace"


def fields(operation: str) -> list[Field]:
    """The members of an operation's struct in the header."""
    text = (CSRC / "sana_edge.h").read_text()
    body = text[: text.index(f"}} sana_edge_{operation}_args;")].rpartition("typedef struct {\n")[2]
    member = re.compile(r"^  (.+?)(\w+);(?:\s*/\* (.+) \*/)?$", re.MULTILINE)
    found = [Field(name, kind.strip(), comment) for kind, name, comment in member.findall(body)]
    assert len(found) == body.count(";") - sum(field.comment.count(";") for field in found)
    return found


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which(os.environ.get("CC", "cc"))
    if found is None:
        pytest.skip("no C compiler")
    return found


def run(compiler: str, source: str, folder: Path, *libraries: Path) -> subprocess.CompletedProcess[str]:
    """Compile a program, and start it."""
    (folder / "program.c").write_text(source)
    places = [f"-Wl,-rpath,{library.parent}" for library in libraries]
    command = [compiler, *STRICT, str(folder / "program.c"), *map(str, libraries), *places, "-lm"]
    done = subprocess.run([*command, "-o", str(folder / "program")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return subprocess.run([folder / "program"], capture_output=True, text=True)


def test_header_is_c_and_structs_are_those_of_python(compiler: str, tmp_path: Path) -> None:
    lines = ['#include "sana_edge.h"', "#include <stddef.h>"]
    structs: dict[str, type[ctypes.Structure]] = {
        f"sana_edge_{name}_args": operation.struct for name, operation in operations.OPERATIONS.items()
    }
    structs["sana_edge_device_info"] = cuda_library.DeviceInfo
    checks = [f"SANA_EDGE_ABI == {cuda_library.ABI}"]
    for name, struct in structs.items():
        checks.append(f"sizeof({name}) == {ctypes.sizeof(struct)}")
        for member, *_ in struct._fields_:
            there = getattr(struct, member)
            checks.append(f"offsetof({name}, {member}) == {there.offset}")
            checks.append(f"sizeof((({name} *)0)->{member}) == {there.size}")
    types = {"FP32": 0, "FP16": 1, "BF16": 2}
    checks += [f"SANA_EDGE_{name} == {value}" for name, value in types.items()]
    # an array of -1 elements where a check fails
    lines += [f"typedef char check_{n}[({check}) ? 1 : -1];" for n, check in enumerate(checks)]
    assert run(compiler, "\n".join([*lines, "int main(void) { return 0; }"]), tmp_path).returncode == 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_python_has_the_fields_of_the_header(operation: str) -> None:
    """Sizes and offsets agree also where two fields of a kind are swapped; their names then do not."""
    kinds = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
    expected = [
        (field.name, ctypes.c_void_p if field.pointer else kinds[field.kind]) for field in fields(operation)
    ]
    assert operations.OPERATIONS[operation].struct._fields_ == expected


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_refused(operation: str, compiler: str, emulated_library: Path, tmp_path: Path) -> None:
    assert hasattr(ctypes.CDLL(str(emulated_library)), f"sana_edge_{operation}"), "not in the library"
    done = run(compiler, program(operation), tmp_path, emulated_library)
    assert done.returncode == 0, done.stdout + done.stderr


def program(operation: str) -> str:
    """Calls an operation with one thing wrong at a time; says what was answered otherwise than expected."""
    checks = "\n".join(
        f'  a = valid; {change} expect("{change}", sana_edge_{operation}(&a, NULL), SANA_EDGE_{status});'
        for change, status in cases(operation)
    )
    members = fields(operation)
    settings = {**VALID[operation], **{f.name: str(FP16) for f in members if f.name == "type"}}
    pointers = [field.name for field in members if field.pointer]
    left_out = LEFT_OUT.get(operation, set())
    assign = [f"  valid.{name} = memory[{n}];" for n, name in enumerate(pointers) if name not in left_out]
    assign += [f"  valid.{name} = {value};" for name, value in settings.items()]
    return PROGRAM.format(operation=operation, count=len(pointers), assign="\n".join(assign), checks=checks)


def cases(operation: str) -> Iterator[tuple[str, str]]:
    """Changes of a valid struct, in C, and the status that each must get."""
    yield "", "OK"
    members = fields(operation)
    nothing = " ".join(f"a.{field.name} = NULL;" for field in members if field.pointer)
    left_out = LEFT_OUT.get(operation, set())
    for field in members:
        name = f"a.{field.name}"
        if field.pointer and field.name not in left_out:
            yield f"{name} = NULL;", "OK" if field.optional else "NULL_POINTER"
            yield f"{name} = (void *)((char *)valid.{field.name} + 1);", "BAD_ALIGNMENT"
            if field.matrix:
                yield f"{name} = (void *)((char *)valid.{field.name} + 8);", "BAD_ALIGNMENT"
        elif field.name == "workspace_bytes":
            yield f"{name} = 0;", "WORKSPACE"
            yield f"{name} = -1;", "WORKSPACE"
        elif field.name == "type":
            types = [t for t in (-1, 3, FP32) if t != FP32 or "fp32" not in field.comment]
            yield from ((f"{name} = {t};", "BAD_TYPE") for t in types)
            yield f"{name} = -1; {nothing}", "BAD_TYPE"
        elif field.name in SIZES:
            yield f"{name} = -1;", "BAD_SHAPE"
            # shapes are looked at before pointers; this one counts only with a gate or a constant
            if (operation, field.name) != ("w8a8_linear", "tokens"):
                yield f"{name} = -1; {nothing}", "BAD_SHAPE"
            if field.name in COUNTS:
                yield f"{name} = 0; {nothing}", "OK"
            yield from ((f"{name} = {size};", "BAD_SHAPE") for size in wrong_sizes(operation, field))
    if operation == "w8a8_conv2d":
        for number in ("upsample", "activation", "out_activation"):
            yield from ((f"a.{number} = {n};", "BAD_SHAPE") for n in (3, -1))
        yield "a.kernel = 5;", "BAD_SHAPE"


def wrong_sizes(operation: str, field: Field) -> Iterator[int]:
    """Sizes beyond what the header's comment allows."""
    multiple = re.search(r"(?:^|; )a multiple of (\d+)", field.comment)
    step = int(multiple[1]) if multiple else 1
    if step > 1 and not (operation == "w8a8_conv2d" and field.name == "columns"):
        yield int(VALID[operation][field.name]) + step // 2
    most = re.search(r"at most (\d+)", field.comment)
    if most:
        yield int(most[1]) // step * step + step


def test_kernels_that_begin_early_wait_first() -> None:
    """All threads of all kernels of a file: one that is done early must not seem to be the one before it."""
    kernel = re.compile(r"^__global__ .*?\) \{\n(.*?)\n", re.MULTILINE | re.DOTALL)
    early = [file for file in CSRC.glob("*.cu") if "BEGINS_EARLY" in file.read_text()]
    assert {"w8a8_linear_quantize", "sampler_step"} <= {file.stem for file in early}
    for file in early:
        first = kernel.findall(file.read_text())
        assert first and all(line.strip() == "wait_for_kernels();" for line in first), file.name


def test_library_functions(compiler: str, emulated_library: Path, tmp_path: Path) -> None:
    done = run(compiler, LIBRARY_FUNCTIONS, tmp_path, emulated_library)
    assert done.returncode == 0, done.stdout + done.stderr


def test_example(compiler: str, emulated_library: Path, tmp_path: Path) -> None:
    """csrc/example.c allows itself half a step of 33 / 8 / 127, and of bf16 at 30 / 8: 0.017 + 0.008."""
    source = f"#define EMULATED\n{(CSRC / 'example.c').read_text()}"
    done = run(compiler, source, tmp_path, emulated_library)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("compute capability 8.9, largest error 0.0")


def test_known_answers(compiler: str, emulated_library: Path, tmp_path: Path) -> None:
    """csrc/known_answers.c, which runs under compute-sanitizer where there is a GPU, has every operation."""
    source = f"#define EMULATED\n{(CSRC / 'known_answers.c').read_text()}"
    done = run(compiler, source, tmp_path, emulated_library)
    assert done.returncode == 0, done.stdout + done.stderr
    for operation in OPERATIONS:
        assert f"RUN({operation}, a)" in source
    assert done.stdout.endswith("0 wrong\n")


# every pointer has memory of its own, of small integers: a length is 1, floats are next to 0
PROGRAM = """#include "sana_edge.h"
#include <stdio.h>
#include <string.h>

#define BYTES (1 << 20)
static union {{ double aligned; char bytes[{count} * BYTES + 256]; }} store;
static int failures;

static void expect(const char *change, sana_edge_status status, sana_edge_status expected) {{
  if (status == expected) return;
  failures++;
  printf("%s is answered %d (%s), not %d\\n", *change ? change : "valid", status,
         sana_edge_status_text(status), expected);
}}

int main(void) {{
  static void *memory[{count}];
  static sana_edge_{operation}_args valid, a;
  char *start = store.bytes + (256 - (size_t)store.bytes % 256) % 256;
  size_t i;
  for (i = 0; i < {count} * BYTES; i += 4) {{
    const int32_t one = 1;
    memcpy(start + i, &one, 4);
  }}
  for (i = 0; i < {count}; i++) memory[i] = start + i * BYTES;
{assign}
  expect("no struct", sana_edge_{operation}(NULL, NULL), SANA_EDGE_NULL_POINTER);
{checks}
  return failures != 0;
}}
"""

LIBRARY_FUNCTIONS = """#include "sana_edge.h"
#include <stdio.h>
#include <string.h>

#define CHECK(condition) \\
  if (!(condition)) { \\
    puts(#condition); \\
    return 1; \\
  }

int main(void) {
  sana_edge_device_info info;
  int status;
  CHECK(sana_edge_abi() == SANA_EDGE_ABI);
  CHECK(sana_edge_emulated() == 890);
  CHECK(strlen(sana_edge_version()) > 0);
  CHECK(strlen(sana_edge_architectures()) > 0);
  CHECK(sana_edge_device(0, NULL) == SANA_EDGE_NULL_POINTER);
  CHECK(sana_edge_device(0, &info) == SANA_EDGE_OK);
  CHECK(info.capability == 89 && info.processors > 0 && info.shared_memory > 0);
  for (status = SANA_EDGE_OK; status <= SANA_EDGE_LAUNCH_FAILED; status++)
    CHECK(strcmp(sana_edge_status_text(status), sana_edge_status_text(-1)) != 0);
  CHECK(strlen(sana_edge_status_text(-1)) > 0 && strlen(sana_edge_status_text(1000)) > 0);
  CHECK(sana_edge_qkv_linear_attention_workspace(1, 1024, 36) >= 0);
  CHECK(sana_edge_qkv_linear_attention_workspace(16, 16384, 70) >= 0);
  return 0;
}
"""
