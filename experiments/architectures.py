"""Try every kind of causal LM in transformers, as a tiny random model, with everything that qbench does to a model.

    python experiments/architectures.py [TYPE …]

A type is a `model_type` of config.json. If types are named, the other rows of the table stay as they are. Each type has a
process of its own. It tries a run with its fine-tune, `qbench quantize`, and `save_pretrained` of the packed model.

Writes architectures.md and architectures.json, with the outcome of each type:

    ok           everything works
    told         everything works, and a message says what stays in 16 bit, has no adapter or is not timed
    refused      an error of one line says why not
    not built    transformers cannot make the tiny model
    traceback    a bug; the exit code is then 1
"""

import argparse
import json
import os
import re
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

import qbench.cli.api
import qbench.cli.quantize as quantizing
from qbench.checkpoint import loading, packed_checkpoint
from qbench.checkpoint.location import BUNDLED
from qbench.errors import InputError
from qbench.measure import quality
from qbench.model import selection
from qbench.model.unquantized import describe_unquantized
from qbench.report.table import Table
from qbench.runs import isolated

OUT = Path(__file__).parents[1] / "reports" / "architectures"
JSON = "architectures.json"
VERSIONS = {name: module.__version__ for name, module in (("transformers", transformers), ("torch", torch))}
SECONDS, BYTES = 120, 4 * 2**30  #: limits for one type: seconds of CPU time, bytes of memory
VOCABULARY = 4096  # of the bundled tokenizer
NF4 = {"name": "nf4", "block": 64, "dq": False}
OUTCOMES = "ok", "told", "refused", "not built", "traceback"  #: from best to worst; a type gets its worst one

#: the largest value of each config key: the first pattern that matches the whole key counts
SMALL = {
    r".*_token_(id|index)|(image|audio|video)_token_.*": VOCABULARY - 1,
    r".*vocab(_size.*|_offset)?": VOCABULARY,
    r"n_layers?|num_(hidden_|encoder_|decoder_|conf_)?layers|(en|de)coder_layers|num_blocks|depth": 2,
    r"mamba_n(um)?_heads|linear_num_value_heads": 8,
    r".*(key_value|kv|num_key)_heads|kv_n_heads|num_query_groups|.*n_groups?|num_expert_group": 2,
    r".*(heads|n_head)|.*(num|n)_.*experts|zero_expert_num|expert_num": 4,
    r".*(topk|top_k|experts_per_tok(en)?|moe_k)": 2,
    r"topk_group": 1,
    r"qk_head_dim": 32,
    r".*(head_dim|head_size|d_head|headdim|dim_head|d_kv|rotary_dim|head_channels|kv_channels|lowrank|_rank)": 16,
    r".*d_state|state_size|ssm_state_size|.*chunk_size|block_size|codebook_.*": 16,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_(source|target)_positions|.*window.*": 256,
    r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|feed_forward_size|dim_ff|d?_?ff|mlp_dim|d_inner)": 128,
    r".*(hidden_size(_.*)?|d_model|n_embd|embedding_size|(emb|embed|embedding|proj|hidden)_dim|lru_width)": 64,
    r"adapter_(in|out)_dim|adapter_input_size": 64,
}  # fmt: skip
_INDEXER = {f"indexer_{key}": value for key, value in dict(
    n_heads=2, kv_heads=1, head_dim=16, budget=32, compress_ratio=4).items()}  # fmt: skip
_TWO_KINDS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
#: further config values for types whose defaults do not work, or do not when they are shrunk
NEEDED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {part: {"vocab_size": VOCABULARY} for part in ("patcher_config", "encoder_config", "decoder_config")}
    | {"vocab_size": VOCABULARY},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 4, "layer_types": None, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"vision_config": {"pyramid_num_routed": [-1, 4]}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"vocab_size": VOCABULARY, "axial_pos_embds_dim": (32, 32), "axial_pos_shape": (4, 8),
                 "attn_layers": ["local", "lsh"]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 128,
              "attention_head_dim": 32},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8,
               "attention_head_dim": 32},
}  # fmt: skip
#: arguments without which the default config cannot be made
FIRST = {
    "gemma4_assistant": {"text_config": {
        "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, **_TWO_KINDS}},
}  # fmt: skip


@dataclass
class Row:
    """The outcome of a type. share: quantized part of the eligible weights. said: the messages, one line each."""

    type: str
    cls: str = ""
    share: float | None = None
    outcome: str = "ok"
    said: list[str] = field(default_factory=list)

    def add(self, outcome: str, line: str) -> None:
        self.outcome = max(self.outcome, outcome, key=OUTCOMES.index)
        self.said.append(line)


def config(kind: str) -> PreTrainedConfig:
    """Make a tiny config of a type: the default with smaller sizes, and just enough layers to have each kind of layer."""
    first = FIRST.get(kind, {})
    made = CONFIG_MAPPING[kind](**first)
    return CONFIG_MAPPING[kind](**_merged(_merged(first, _shrunk(made)), NEEDED.get(kind, {})))


def _shrunk(made: PreTrainedConfig) -> dict[str, Any]:
    """Returns the keys of a config that change, with their smaller values."""
    values = {key: value for key, value in made.to_dict().items() if key not in made.sub_configs}
    small = {key: smaller for key, value in values.items() if (smaller := _small(key, value)) != value}
    if values.get("num_key_value_heads") == values.get("num_attention_heads") and "num_attention_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if (kinds := values.get("layer_types")) and "num_hidden_layers" in values:
        n = next(n for n in range(2, len(kinds) + 1) if set(kinds[:n]) == set(kinds))
        small |= {"num_hidden_layers": n, "layer_types": kinds[:n]}
    parts = {name: part for name in made.sub_configs if (part := getattr(made, name, None)) is not None}
    return small | {name: {**_shrunk(part), "model_type": part.model_type} for name, part in parts.items()}


def _small(key: str, value: Any) -> Any:
    if key == "is_decoder":  # otherwise it also attends to later tokens
        return True
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if key == "pad_token_id":  # its embedding is zeros, so it must not begin a text
        return 1
    return next((min(most, value) for pattern, most in SMALL.items() if re.fullmatch(pattern, key)), value)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Merge the second dict into the first, and the dicts within them likewise."""
    inner = {key: _merged(first[key], value) for key, value in second.items()
             if isinstance(value, dict) and isinstance(first.get(key), dict)}  # fmt: skip
    return first | second | inner


def build(kind: str, folder: Path) -> PreTrainedModel:
    """Make a tiny random model of a type, and save it with the bundled tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    return model


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _run(row: Row, folder: Path, scratch: Path) -> None:
    metrics = qbench.cli.api.run(
        "nf4",
        64,
        model={"path": str(folder), "dtype": "float32"},
        data={"seq": 32},
        tune={"steps": 2, "batch": 2, "rank": 4},  # adapters on a router of four experts allow no higher rank
        eval={"tokens": 128},
        out=scratch / "run",
    ).metrics
    bits, rates = metrics["bits"], metrics["throughput"]
    row.share = bits["quantized_parameters"] / bits["eligible_parameters"]
    if bits["left"]:
        row.add("told", describe_unquantized(bits["left"], row.share))
    if spared := metrics["tune"]["left"]:
        row.add("told", f"No adapter on {_first(spared)}.")
    if untimed := rates.get("untimed"):
        row.add("told", f"Not timed: {_first(untimed)}.")


def _first(reasons: dict[str, str]) -> str:
    name, why = next(iter(reasons.items()))
    return f"{name}{f' and {len(reasons) - 1} more' if len(reasons) > 1 else ''}: {why}"


def _quantize(row: Row, folder: Path, scratch: Path) -> None:
    """Check that quantizing one tensor at a time gives the same model as quantizing in memory."""
    out = scratch / "quantized"
    quantizing.quantize({"format": NF4, "model": {"path": str(folder)}, "out": str(out), "layout": "qbench"})
    _same(_packed(folder), packed_checkpoint.load(out, torch.device("cpu"), torch.float32).model)


def _save(row: Row, folder: Path, scratch: Path) -> None:
    model, out = _packed(folder), scratch / "saved"
    model.save_pretrained(out)
    _same(model, AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval())


def _packed(folder: Path) -> PreTrainedModel:
    return qbench.pack(loading.load(str(folder), torch.float32, torch.device("cpu")).model, **_named(NF4))


def _named(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"format" if key == "name" else key: value for key, value in arguments.items()}


@torch.inference_mode()
def _same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    assert selection.packed_layers(model).keys() == selection.packed_layers(other).keys()
    tokens = torch.arange(100, 120)[None]
    quality.check_logits(model, tokens)
    logits = [m(input_ids=tokens, use_cache=False).logits for m in (model, other)]
    assert torch.equal(*logits), "logits differ"


STEPS = {"run": _run, "quantize": _quantize, "save": _save}


def tried(kind: str, scratch: Path, steps: Iterable[str] = STEPS) -> Row:
    """Try some of `STEPS` on a type, in an empty folder."""
    row, folder = Row(kind, CLASSES[kind]), scratch / "model"
    try:
        row.cls = type(build(kind, folder)).__name__
    except Exception as error:
        row.add("not built", _line(error))
        return row
    for name in steps:
        try:
            STEPS[name](row, folder, scratch)
        except InputError as error:
            row.add("refused", f"{name}: {str(error).replace(str(folder), 'MODEL').replace(f'{scratch}/', '')}")
        except Exception as error:
            row.add("traceback", f"{name}: {_line(error)}")
    return row


def apart(kind: str) -> Row:
    """Run `tried` in a process of its own, with limits on time and memory."""
    with tempfile.TemporaryDirectory() as scratch:
        file, output_file = Path(scratch, "row.json"), Path(scratch, "output.txt")

        def work() -> int:
            resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            signal.alarm(5 * SECONDS)  # the machine may be busy
            torch.set_num_threads(1)
            with output_file.open("w", encoding="utf-8") as output, redirect_stdout(output), redirect_stderr(output):
                file.write_text(json.dumps(asdict(tried(kind, Path(scratch)))), "utf-8")
            return 0

        code = isolated.call(work)
        if file.is_file():
            return Row(**json.loads(file.read_text("utf-8")))
        ended = f"{signal.Signals(-code).name} ended the process" if code < 0 else f"the process ended with {code}"
        return Row(kind, CLASSES[kind], None, "traceback", [ended])


def _with_others(rows: list[Row], file: Path) -> list[Row]:
    """Returns `rows` and the rows in `file` of types that were not tried, in the order of transformers."""
    before = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    kept = before["types"] if before.get("versions") == VERSIONS else []
    by_type = {row["type"]: Row(**row) for row in kept} | {row.type: row for row in rows}
    return [by_type[kind] for kind in CLASSES if kind in by_type]


def write(rows: list[Row], out: Path) -> None:
    counts = Counter(row.outcome for row in rows)
    summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
    columns = ["type", "class", "quantized", "outcome", "message"]
    cells = [
        [row.type, row.cls, "" if row.share is None else f"{row.share:.1%}", row.outcome, " ".join(row.said)]
        for row in rows
    ]  # fmt: skip
    table = Table.from_texts(columns, cells)
    head = [
        "# Causal LMs of transformers", "",
        f"transformers {VERSIONS['transformers']}, PyTorch {VERSIONS['torch']}: {len(rows)} types, {summary}.", "",
        *table.to_markdown(), "",
    ]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "architectures.md").write_text("\n".join(head), "utf-8")
    plain = {"versions": VERSIONS, "counts": counts, "types": [asdict(row) for row in rows]}
    (out / JSON).write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types; without any, all of them")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for architectures.md and .json")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    given = parser.parse_args()
    rows = []
    with ThreadPoolExecutor(given.jobs) as pool:
        for row in pool.map(apart, given.types or list(CLASSES)):
            rows.append(row)
            print(f"{row.type:28} {row.outcome:10} {' '.join(row.said)[:150]}", flush=True)
    write(_with_others(rows, given.out / JSON), given.out)
    return any(row.outcome == "traceback" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
