"""Compiles kernels for a Hopper GPU, which needs none; run in a process of its own, where Triton does not interpret.

Prints, as JSON by kernel, how many 16-byte loads and stores of global memory its PTX holds.
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# By name: the package's functions hide the modules `route` and `activate`.
PEERS, ROUTE, ACTIVATE, REPLICAS, ROWS, SORT, PIECES = (
    import_module(f"moe.kernels.{name}")
    for name in ("peers", "route", "activate", "replicas", "rows", "sort", "pieces")
)
BF16, FLOAT, LONG, INT, BOOL = "*bf16", "*fp32", "*i64", "*i32", "*i1"
WIDTHS = {"M": 2048, "BLOCK": 2048}
KERNELS: list[tuple[str, Any, list[str], dict[str, Any], int]] = [
    (
        "pull",
        PEERS._pull_rows,
        [LONG, BF16, FLOAT, INT, BF16, FLOAT, "i64", "i64", "i32", "i32"],
        {"K": 8, "WEIGHTED": True, **WIDTHS},
        4,
    ),
    (
        "place local",
        PEERS._place_local,
        [LONG, LONG, INT, INT, "i64", "i32", "i32", "i32", "i32", "i32"],
        {"L": 16, "CHUNK": 512, "EXPERTS": 16},
        4,
    ),
    ("count crossings", PEERS._count_crossings, [LONG, INT, LONG, "i32", "i32"], {"K": 2, "BLOCK": 1024}, 4),
    (
        "push",
        PEERS._push_sums,
        [LONG, BF16, INT, BF16, FLOAT, FLOAT, "i64", "i64", "i32", "i32"],
        {"K": 8, "SLOTS": 2, "ALONE": False, "GRADS": True, **WIDTHS},
        4,
    ),
    (
        "sum",
        PEERS._sum_partials,
        [BF16, LONG, FLOAT, BF16, FLOAT, "i32"],
        {"E": 128, "K": 8, "SLOTS": 2, "GRADS": True, **WIDTHS},
        4,
    ),
    (
        "route",
        ROUTE._route,
        [BF16, FLOAT, FLOAT, FLOAT, LONG, FLOAT, FLOAT, "i32"],
        {
            "E": 8,
            "K": 2,
            "M": 2048,
            "TOKENS": 64,
            "EXPERTS": 16,
            "CHOICES": 2,
            "WIDTH": 64,
            "BF16": True,
            "HAS_BIAS": True,
        },
        4,
    ),
    (
        "route 256",
        ROUTE._route,
        [BF16, FLOAT, FLOAT, FLOAT, LONG, FLOAT, FLOAT, "i32"],
        {
            "E": 256,
            "K": 8,
            "M": 3584,
            "TOKENS": 32,
            "EXPERTS": 256,
            "CHOICES": 8,
            "WIDTH": 32,
            "BF16": True,
            "HAS_BIAS": False,
        },
        8,
    ),
    (
        "activate backward",
        ACTIVATE._activate_backward,
        [BF16, FLOAT, INT, BF16, FLOAT],
        {"H": 4096, "L": 8, "SWIGLU": True, "WEIGHTED": True, "BLOCK": 2048},
        4,
    ),
    (
        "activate",
        ACTIVATE._activate,
        [BF16, FLOAT, INT, BF16],
        {"H": 4096, "L": 8, "SWIGLU": True, "WEIGHTED": True, "BLOCK": 2048},
        4,
    ),
    ("gather rows", ROWS._gather_rows, [BF16, LONG, BF16], {"DIVISOR": 2, **WIDTHS}, 4),
    ("sum copies", ROWS._sum_copies, [BF16, LONG, FLOAT, BF16, "i32"], {"K": 2, "WEIGHTED": True, **WIDTHS}, 4),
    (
        "weight copies",
        ROWS._weight_copies,
        [BF16, BF16, LONG, FLOAT, BF16, FLOAT, "i32"],
        {"K": 2, **WIDTHS},
        4,
    ),
    ("count choices", SORT._count_choices, [LONG, INT, "i32"], {"E": 16, "BLOCK": 1024, "EXPERTS": 16}, 4),
    (
        "place copies",
        SORT._place_copies,
        [LONG, INT, INT, LONG, LONG, "i32", "i32"],
        {"E": 16, "BLOCK": 1024, "EXPERTS": 16},
        4,
    ),
    ("lay pieces", PIECES._lay_pieces, [LONG, LONG, LONG, "i32"], {"BLOCK": 1024}, 4),
    (
        "count in queue",
        REPLICAS._count_in_queue,
        [LONG, INT, "i32"],
        {"E": 16, "K": 2, "BLOCK": 1024, "EXPERTS": 16},
        4,
    ),
    (
        "take turns",
        REPLICAS._take_turns,
        [LONG, INT, INT, LONG, LONG, LONG, BOOL, LONG, "i32"],
        {"E": 16, "K": 2, "BLOCK": 1024, "EXPERTS": 16, "HAS_QUOTA": True, "HAS_ORDER": True},
        4,
    ),
    (
        "sum replicas",
        REPLICAS._sum_replicas,
        [BF16, BF16, LONG, LONG, FLOAT],
        {"N": 2, "F": 768 * 1536, "IN": 768 * 1536, "OUT": 768 * 1536, "BLOCK": 1024},
        4,
    ),
    (
        "repeat rows",
        REPLICAS._repeat_rows,
        [FLOAT, LONG, BF16],
        {"F": 768 * 1536, "BLOCK": 1024},
        4,
    ),
    (
        "fill replicas",
        REPLICAS._fill_replicas,
        [BF16, LONG, BF16, BF16, "i32"],
        {"F": 768 * 768, "IN": 768 * 1536, "OUT": 768 * 1536, "BLOCK": 1024},
        4,
    ),
]


def compiled(kernel: Any, types: list[str], constants: dict[str, Any], num_warps: int) -> dict[str, int]:
    """Compile a kernel for compute capability 9.0, its tensors 16-byte aligned; raises what the compiler raises."""
    given = iter(types)
    signature = {name: "constexpr" if name in constants else next(given) for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    ptx = done.asm["ptx"]
    return {"loads": ptx.count("ld.global.v4"), "stores": ptx.count("st.global.v4")}


if __name__ == "__main__":
    print(json.dumps({name: compiled(*rest) for name, *rest in KERNELS}))
