"""Sample results with given scores, and a check of a report's page in a browser."""

import math
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from qbench.report.comparison.configurations import Setting
from qbench.report.comparison.grouping import group_runs
from qbench.results import dataframe, store
from qbench.settings import TuneSettings

RATE = {"median": 100.0, "samples": [100.0, 101.0]}
BITS = {"none": 16.0, "int8": 8.0}


def finished(name="nf4", seed=0, quantized=(3.0, 3.1), tuned=None, block=64, dq=False, **more) -> dict:
    """A finished result. quantized, tuned: the nll of each window."""
    base = score([3.0] * len(quantized))
    quality = {"baseline": base, "quantized": score(quantized) | {"against_baseline": against(quantized)}}
    if tuned is not None:
        quality["tuned"] = score(tuned) | {"against_baseline": against(tuned)}
    per_weight = BITS.get(name, 4.0) + (0 if name == "none" else (8 if dq else 32) / block)
    layers = [
        {"name": f"layers.{i}.{kind}", "shape": [8, 8], "sqnr_db": 20.0, "output_relative": 0.1 + 0.01 * i}
        for i in range(3)
        for kind in ("q_proj", "up_proj")
    ]
    rates = {key: RATE for key in ("prefill_tokens_s", "decode_tokens_s")}
    rates |= {"by_rows": [{"rows": rows, **RATE} for rows in (1, 4, 16)]}
    tune = {"method": "lora", "rank": 16, "lr": 1e-3} if tuned is not None else {"method": "none"}
    config = {
        "format": {"name": name}, "block": block, "dq": dq, "seed": seed, "device": "cpu", "model": {"path": None},
        "data": {"path": "kjv"}, "eval": {"tokens": 512}, "tune": tune,
    }  # fmt: skip
    return store.new_result(config | more) | {
        "status": "done",
        "environment": {"device": "a CPU", "threads": 2, "versions": {"torch": "2"}, "commit": None},
        "metrics": {
            "bits": {"per_parameter": per_weight, "baseline": 16.0, "compression": 16 / per_weight, "model": 5.0},
            "error": {"sqnr_db": None if name == "none" else 20.7, "output_relative": 0.1, "layers": layers},
            "quality": quality,
            "memory": {"baseline_bytes": 16e6, "model_bytes": per_weight * 1e6, "peak_bytes": {"tune": {"rss": 2e9}}},
            "throughput": {**rates, "tune_tokens_s": RATE, "baseline": rates},
        },
    }


def whole(name="nf4", seed=0, shift=0.0, **more) -> dict:
    """A finished result with every key that docs/result.md explains. shift: added to the nll of its 12 windows."""
    windows = 3 + 0.1 * np.random.default_rng(9).normal(size=12)
    result = finished(name, seed, windows + shift, windows + shift / 2 - 1, **more)
    config, metrics, quality = result["config"], result["metrics"], result["metrics"]["quality"]
    tune = asdict(TuneSettings(init="loftq", merge=True, adapter_format="int8"))
    result["config"] = config | {
        "format": {"name": name, "source": "a paper"}, "model": {"path": None, "dtype": "float32", "revision": None},
        "data": {"path": "kjv", "seq": 32}, "tune": tune,
        "eval": {"tokens": 512, "tasks": ["docs"], "limit": None, "batch": 8},
    }  # fmt: skip
    result["run"] |= {"id": "0123456789abcdef", "seconds": {"load": 1.5}, "baseline": {"id": "a", "reused": False}}
    result["environment"] |= {"platform": "Linux", "cuda": None, "cpu_flags": ["avx2"]}
    weights = {"sqnr_db": 20.7, "mse": 1e-4, "relative": 0.09, "max_abs": 0.5}
    metrics["error"] |= weights
    metrics["error"]["layers"] = [layer | weights for layer in metrics["error"]["layers"]]
    metrics["bits"] |= {"quantized_parameters": 1000, "parameters": 2000, "left": {"layers.0.router": "it is a router"}}
    metrics["memory"] |= {"weights_bytes": 500, "tuned_bytes": 6_000_000}
    metrics["throughput"] |= {
        "quantize_weights_s": RATE,
        "dequantize_weights_s": RATE,
        "tuned": metrics["throughput"]["baseline"],
    }
    quality["initial"] = quality["quantized"]
    for scores in quality.values():
        scores.get("against_baseline", {})["kl_p99"] = 0.1
    documents = {
        "value": 0.5,
        "stderr": 0.1,
        "n": 3,
        "log": False,
        "documents": [1.0, 0.0, 0.5],
        "higher_is_better": True,
    }
    paired = {"against_baseline": {"delta": 0.0, "stderr": 0.1, "p": 1.0}}
    metrics["tasks"] = {
        "baseline": {"docs": {"acc": documents}},
        **{stage: {"docs": {"acc": documents | paired}} for stage in ("quantized", "tuned")},
    }
    steps = {key: [3.0, 2.5] for key in ("loss", "grad_norm", "lr", "tokens_s")}
    metrics["tune"] = {**steps, "trainable": 100, "padding": 0.0, "optimizer": {"peak_bytes": 800}}
    init = {"quantized": weights, "initial": weights}
    metrics["init"] = {"method": "loftq", **init, "layers": [{"name": "layers.0.q_proj", **init}]}
    unmerged = {
        "against_unmerged": {"delta_nll": 0.0, "stderr": 0.0, "p": 1.0},
        "bits": {"model": 5.0},
        "bytes": 5_000_000,
    }
    metrics["merged"] = {kind: quality["tuned"] | unmerged for kind in ("adapters", "16bit", "requantized")}
    metrics["weights"] = {"edges": [-1.0, -0.5, 0.5, 1.0], "density": [0.2, 1.0, 0.2], "levels": [[-1.0, 0.0, 1.0]]}
    return result


def score(windows) -> dict:
    nll = float(np.mean(windows))
    return {"nll": nll, "perplexity": math.exp(nll), "stderr": 0.01, "tokens": 512, "windows": list(windows)}


def against(windows) -> dict:
    return {"delta_nll": float(np.mean(windows)) - 3, "stderr": 0.01, "p": 0.5, "kl_mean": 0.01, "top1_agreement": 0.9}


def by_file(runs) -> dict[Path, dict]:
    return {Path(f"{i}/result.json"): dataframe._compact(run) for i, run in enumerate(runs)}


def only(runs) -> Setting:
    (setting,) = group_runs(by_file(runs))
    return setting


def browsed(page: Path) -> dict[str, str]:
    """Click each table head twice in a browser; skip the test where there is none.

    Returns wrong: heads of columns that did not sort; asked: the number of resources that the page loaded; wide: by how
    many pixels it is wider than a window of 500 pixels.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium on this machine")
    script = """<script>
      const sorted = values => values.every((v, i) => i == 0 || v === "" || Number(values[i - 1]) <= Number(v));
      let wrong = [];
      for (const table of document.querySelectorAll("section[id^=s] table")) {
        const rows = table.tBodies[0].rows;
        const column = i => [...rows].map(row => row.cells[i].dataset.value ?? row.cells[i].textContent);
        table.querySelectorAll("th button").forEach((head, i) => {
          if (column(i).some(v => v !== "" && isNaN(v))) return;
          head.click(); if (!sorted(column(i))) wrong.push(head.textContent);
          head.click(); if (!sorted(column(i).filter(v => v !== "").reverse())) wrong.push(head.textContent);
        });
      }
      document.body.dataset.wrong = wrong.join();
      document.body.dataset.asked = performance.getEntriesByType("resource").length;
      document.body.dataset.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    </script></body>"""
    test = page.with_name("test.html")
    test.write_text(page.read_text("utf-8").replace("</body>", script), "utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
    dom = subprocess.run([browser, *flags, test.as_uri()], capture_output=True, text=True, timeout=120).stdout
    return dict(re.findall(r'data-(wrong|asked|wide)="([^"]*)"', dom.partition("<body")[2].partition(">")[0]))
