"""Compile every kernel for cards that are not here, and print what each became, a JSON line a kernel and card.

    python tests/support/triton_offline.py [sm_80 sm_90 …]

Triton brings `ptxas` and `cuobjdump`, so this needs no GPU and no CUDA. It runs in a process of its own
because TRITON_INTERPRET, which the other kernel tests set, exchanges the compiler for an interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from md3cli.model.kernels import (
    attention_kernels,
    decision_kernels,
    decision_operators,
    expert_kernels,
    operators,
    resize_kernels,
    row_kernels,
    slot_kernels,
    vision_kernels,
    vision_operators,
)
from md3cli.model.kernels.tiles import RESIZED_VALUES, TAPS_STEP, Product, Tile, WeightForm, tile_for
from md3cli.model.network.text import PassKind

TARGETS = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90, "sm_100": 100, "sm_120": 120}
DIM, INNER, EXPERTS, CHOICES, HEADS = 2048, 1024, 64, 8, 32
FLOATS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
COSINE = 32
CODES = {WeightForm.FP8: "*u8", WeightForm.INT8: "*i8", WeightForm.INT4: "*u8"}


@dataclass(frozen=True)
class Variant:
    """One kernel with its types and constants. `has_products`: matrix instructions are expected in it.

    `stack`: bytes of local memory that it may have: cosines of angles over 100,000, which never come, need 32.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    has_products: bool = False
    wide_loads: bool = True
    stack: int = 0
    nothing: tuple[str, ...] = field(default=())  # arguments that are None

    def source(self) -> ASTSource:
        """What Triton compiles: pointers are 16-byte aligned, as torch's allocations are."""
        names = self.kernel.arg_names
        constants = self.constants | dict.fromkeys(self.nothing)
        signature = {name: "constexpr" if name in constants else self.types.get(name, "i32") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
        return ASTSource(self.kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)


def _tiled(tile: Tile) -> dict[str, int]:
    return {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth}


def product_variants(capability: tuple[int, int]) -> Iterator[Variant]:
    """Both products of the experts and the dense one, in every dtype, form and kind of pass at the real size."""
    blocks = {"pair_token": "*i32", "block_expert": "*i32", "block_first": "*i32", "ends": "*i32"}
    for dtype, pointer in FLOATS.items():
        # float32 answers are computed from plain weights: `load.load_weights` widens codes for it.
        for form in WeightForm if dtype is not torch.float32 else (WeightForm.PLAIN,):
            for kind in PassKind:
                weight = {"w": CODES.get(form, pointer), "scale": "*fp32", "zero": "*fp32"}
                name = f"{str(dtype).removeprefix('torch.')} {form.name.lower()} {kind}"
                shared = {"FORM": operators.kernel_form(form, dtype, capability), "EVEN": True}
                experts = {"K": INNER, "OUT": DIM, "IS_DENSE": False, "HAS_BIAS": False}
                dense = {"K": DIM, "OUT": 3 * DIM, "IS_DENSE": True, "HAS_BIAS": True}
                of = {"has_products": dtype is not torch.float32}

                tile = tile_for(Product.UP_GATE, kind, form, dtype, capability)
                groups = DIM // 128 if form is WeightForm.INT4 else 1
                yield Variant(
                    f"up_gate {name}", expert_kernels.up_gate, weight | blocks | {"x": pointer, "y": pointer},
                    shared | _tiled(tile) | {"D": DIM, "INNER": INNER, "GROUPS": groups}, tile.warps, tile.stages, **of,
                )  # fmt: skip
                tile = tile_for(Product.DOWN, kind, form, dtype, capability)
                groups = INNER // 128 if form is WeightForm.INT4 else 1
                down = {"y": pointer, "z": pointer, "bias": pointer}
                yield Variant(
                    f"down {name}", expert_kernels.down, weight | blocks | down,
                    shared | _tiled(tile) | experts | {"GROUPS": groups},
                    tile.warps, tile.stages, **of,
                )  # fmt: skip
                tile = tile_for(Product.DENSE, kind, form, dtype, capability)
                groups = DIM // 128 if form is WeightForm.INT4 else 1
                yield Variant(
                    f"dense {name}", expert_kernels.down, weight | down,
                    shared | _tiled(tile) | dense | {"GROUPS": groups},
                    tile.warps, tile.stages, nothing=("block_expert", "block_first", "ends"), **of,
                )  # fmt: skip


def other_variants(capability: tuple[int, int]) -> Iterator[Variant]:
    """The plan, the weighted sum, and what stands between projection and attention."""
    lists = dict.fromkeys(("pair_token", "place", "block_expert", "block_first", "ends", "counts"), "*i32")
    lists |= {"live": "*i1", "weight": "*fp32"}
    routing = {"X": EXPERTS, "XP": EXPERTS, "A": CHOICES}
    plain = {"wide_loads": False}
    for dtype, pointer in FLOATS.items():
        name = str(dtype).removeprefix("torch.")
        logits = lists | {"logits": pointer}
        for rows in operators.PLAN_HEIGHTS:
            sizes = routing | {"BM": 16, "R": rows, "BP": 128, "HAS_LIVE": True}
            warps = 16 if rows > 8 else 4
            yield Variant(f"plan_rows {name} {rows}", expert_kernels.plan_rows, logits, sizes, warps, **plain)
        tiles = routing | {"R": 64, "HAS_LIVE": True}
        yield Variant(f"count_tiles {name}", expert_kernels.count_tiles, logits, tiles, **plain)
        yield Variant(f"place_tiles {name}", expert_kernels.place_tiles, logits, tiles, 8, **plain)
        yield Variant(
            f"combine {name}", expert_kernels.combine,
            lists | dict.fromkeys(("z", "residual", "branch", "out"), pointer),
            {"D": DIM, "A": CHOICES, "HAS_RESIDUAL": True, "BN": 512}, 2,
        )  # fmt: skip
        for kind in PassKind:
            tile = tile_for(Product.TAU, kind, WeightForm.PLAIN, dtype, capability)
            sizes = {"BM": tile.rows, "BJ": 2 * HEADS, "BK": tile.depth, "PART": 128 if tile.rows == 16 else 2048}
            yield Variant(
                f"tau_products {name} {kind}", attention_kernels.tau_products,
                {"qkv": pointer, "w": pointer, "parts": "*fp32"},
                sizes | {"K": 3 * DIM, "J": 2 * HEADS, "EVEN": True}, tile.warps, tile.stages,
                has_products=dtype is not torch.float32,
            )  # fmt: skip
        for returns_kv in (False, True):
            yield Variant(
                f"tau_rope_store {name}{' returning' if returns_kv else ''}", attention_kernels.tau_rope_store,
                dict.fromkeys(("qkv", "alpha", "q_out", "k_out", "v_out", "keys", "values"), pointer)
                | {"parts": "*fp32", "table": "*fp32", "position": "*i64", "slots": "*i64"},
                {"H": HEADS, "J": 2 * HEADS, "S": 48, "BH": 32, "RETURNS_KV": returns_kv, "STORES": True}, 2,
            )  # fmt: skip
        for count, width in ((1, 128), (2, 256)):
            yield Variant(
                f"fourier_features {name} {count}", row_kernels.fourier_features,
                {"values": "*fp32", "frequencies": pointer, "out": pointer},
                {"N": count, "F": width, "BF": width, "BR": 4}, stack=COSINE, **plain,
            )  # fmt: skip
        over_slots = dict.fromkeys(("q", "keys", "values", "out"), pointer)
        over_slots |= {"parts": "*fp32", "stats": "*fp32", "slots": "*i64", "position": "*i64"}
        of_slots = {"H": HEADS, "SPLIT": operators.SPLIT}
        yield Variant(f"attend_split {name}", slot_kernels.attend_split, over_slots, of_slots, operators.SPLIT_WARPS)
        for splits in (1, 6, 16):
            yield Variant(
                f"join_splits {name} {splits}", slot_kernels.join_splits,
                over_slots, of_slots | {"BH": 8, "S": splits}, 4,
            )  # fmt: skip
        yield Variant(
            f"attend_block {name}", slot_kernels.attend_block, over_slots,
            {"H": HEADS, "BM": operators.BLOCK_QUERIES, "BC": operators.block_positions(dtype)},
            has_products=dtype is not torch.float32,
        )  # fmt: skip
    yield Variant("rotary_angles", row_kernels.rotary_angles,
                  {"position": "*i64", "frequency": "*fp32", "table": "*fp32"}, {"F": 16, "BR": 16},
                  stack=COSINE, **plain)  # fmt: skip
    yield Variant("plan_tiles", expert_kernels.plan_tiles, lists,
                  {"X": EXPERTS, "XP": EXPERTS, "BM": 128, "TP": 128, "BP": 128}, 8, **plain)  # fmt: skip
    for kernel in (resize_kernels.resize_width, resize_kernels.resize_height):
        for step in (TAPS_STEP, 1):
            yield Variant(
                f"{kernel.__name__} {step}", kernel, {"pixels": "*u8", "table": "*i32", "out": "*u8"},
                {"STEP": step, "BV": RESIZED_VALUES}, RESIZED_VALUES // 32, stages=1, **plain,
            )  # fmt: skip


def vision_variants() -> Iterator[Variant]:
    """What stands between the vision encoder's products, at the width of either tower."""
    for dtype, pointer in FLOATS.items():
        name = str(dtype).removeprefix("torch.")
        arguments = ("x", "branch", "weight", "bias", "total_out", "norm_out")
        for width in (1152, DIM):
            yield Variant(
                f"add_layer_norm {name} {width}", vision_kernels.add_layer_norm, dict.fromkeys(arguments, pointer),
                {"D": width, "BD": 2048, "BM": vision_operators.NORM_ROWS, "EPS": 1e-5},
            )  # fmt: skip
        for width, gelu, warps in ((1152, False, 4), (4304, True, 8)):
            yield Variant(
                f"scale_rows {name} {width}", vision_kernels.scale_rows,
                {"x": pointer, "codes": "*u8", "scales": "*fp32"},
                {"K": width, "BK": triton.next_power_of_2(width), "GELU": gelu}, warps,
            )  # fmt: skip
        yield Variant(
            f"patch_rows {name}", vision_kernels.patch_rows, {"crops": "*u8", "values": pointer, "out": pointer},
            {"S": 378, "PATCH": 14, "GRID": 27, "WIDTH": 592, "BLOCK": vision_operators.PATCH_VALUES}, wide_loads=False,
        )  # fmt: skip


def decision_variants() -> Iterator[Variant]:
    """From logits to the next input: of a greedy step, and of a sampled one or first decisions."""
    whole, flags = (
        ("mode", "emitted", "limit", "position", "draws", "index", "drawn"),
        ("is_first", "is_point", "chooses"),
    )
    lists = dict.fromkeys(whole, "*i64") | dict.fromkeys(flags, "*i1")
    lists |= dict.fromkeys(("best_at", "is_finite", "best_at_out", "is_finite_out", "source"), "*i32")
    lists |= dict.fromkeys(("best", "best_out", "sizes", "events"), "*fp32")
    ids, parts = {"ANSWER": 3, "EOS": 0, "SIZE_ID": 6, "V": 51200}, -(-51200 // decision_operators.SCANNED)
    bins = {"C": 1024, "BC": 1024, "Z": 1024, "BZ": 1024, "F": 256, "BF": 256, "COORD": 5, "P": parts, "BP": 32}
    for dtype, pointer in FLOATS.items():
        of_dtype = ("logits", "coord_logits", "size_logits", "frequencies", "features")
        types = lists | dict.fromkeys((*of_dtype, "tokens", "coords", "size_embeddings", "next_inputs"), pointer)
        for is_step in (True, False):
            name, indexed = (
                f"{str(dtype).removeprefix('torch.')}{'' if is_step else ' at index'}",
                {"HAS_INDEX": not is_step},
            )
            nothing = ("index",) if is_step else ()
            yield Variant(
                f"scan_vocabulary {name}", decision_kernels.scan_vocabulary, types,
                ids | indexed | {"PART": decision_operators.SCANNED}, decision_operators.SCAN_WARPS, nothing=nothing,
            )  # fmt: skip
            yield Variant(
                f"decide {name}", decision_kernels.decide, types,
                ids | bins | indexed | {"HAS_DRAWN": not is_step, "WAS_FED": is_step},
                decision_operators.DECIDE_WARPS, nothing=(*nothing, "drawn") if is_step else (),
            )  # fmt: skip
            yield Variant(
                f"feed {name}", decision_kernels.feed, types,
                indexed | {"D": DIM, "BD": decision_operators.FED_COLUMNS}, 2, nothing=nothing,
            )  # fmt: skip


def variants(target: str) -> Iterator[Variant]:
    """All kernels as a card launches them."""
    capability = divmod(TARGETS[target], 10)
    yield from product_variants(capability)
    yield from other_variants(capability)
    yield from vision_variants()
    yield from decision_variants()


def compiled(variant: Variant, target: str) -> dict[str, Any]:
    """Compile one variant for one card; registers, memory and the instructions that matter, or the error."""
    row: dict[str, Any] = {"kernel": variant.name, "target": target, "has_products": variant.has_products,
                           "wide_loads_wanted": variant.wide_loads, "stack_allowed": variant.stack}  # fmt: skip
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    try:
        found = triton.compile(variant.source(), target=GPUTarget("cuda", TARGETS[target], 32), options=options)
    except Exception as error:  # noqa: BLE001 - whatever the compiler says is the result
        return row | {"error": f"{type(error).__name__}: {str(error)[-300:]}"}
    return row | {"shared": found.metadata.shared} | _inspected(found.asm["cubin"])


def _inspected(cubin: bytes) -> dict[str, Any]:
    """Registers, stack bytes, and whether matrix instructions, 16-byte loads and local memory are in the SASS."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(numbers.get("REG", 0)),
        "stack": int(numbers.get("STACK", 0)) + int(numbers.get("LOCAL", 0)),
        "matrix": sorted(set(re.findall(r"\b(HGMMA|HMMA|QMMA|IMMA|UTC\w*MMA)\b", sass))),
        "wide_loads": bool(re.search(r"\b(LDG|LDGSTS)[.\w]*\.128\b|UTMALDG|UBLKCP", sass)),
        "local": bool(re.search(r"\b(LDL|STL)\b", sass)),
    }


def main() -> None:
    """Print a line for each kernel and card."""
    targets = sys.argv[1:] or list(TARGETS)
    jobs = [(variant, target) for target in targets for variant in variants(target)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(lambda job: compiled(*job), jobs):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
