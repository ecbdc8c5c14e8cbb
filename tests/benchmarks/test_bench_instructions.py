"""What is counted in machine code, of lines as cuobjdump writes them."""

from __future__ import annotations

from bench_instructions import kernels

CODE = """
Fatbin elf code:
================
arch = sm_90
code version = [1,7]

\t\tFunction : _ZN9_w8a8_linear_cu_3887304418w8a8_linear_kernelI4TileILi64EE4HalfEEv26args
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   ACQBULK ;                             /* 0x000000000000782e */
                                                                         /* 0x000fe20000000000 */
        /*0010*/                   IMMA.16832.S8.S8 R4, R8.ROW, R2.COL, R4 ;  /* 0x0 */
        /*0020*/              @!P0 FMNMX.NAN R0, R1, |R2|, !PT ;         /* 0x0 */
        /*0030*/                   FSETP.GT.AND P0, PT, R0, R1, PT ;     /* 0x0 */
        /*0040*/                   EXIT ;                                /* 0x0 */
        /*0050*/                   NOP;                                  /* 0x0 */
"""


def test_counts() -> None:
    (row,) = kernels(CODE)
    assert row == {
        "kernel": "w8a8_linear_kernelI4TileILi64EE4Half",
        "architecture": "90",
        "instructions": 5,
        "behind_products": 3,
        "nan_maxima": 1,
        "maxima": 1,
        "comparisons": 1,
        "reciprocals": 0,
        "early_waits": 1,
    }
