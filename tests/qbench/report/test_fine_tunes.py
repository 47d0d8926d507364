"""What a comparison says about fine-tunes: methods, learning rates, initializations and merged adapters."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import false_discovery_control, t

from qbench.report.comparison import adapters, extra_tables, findings, methods, page
from qbench.results import store
from tests.qbench.sample_results import browsed, finished, only, score

TEXT = np.random.default_rng(0).normal(3, 1, 200)  # windows differ far more than what is compared
LORA = {"method": "lora", "rank": 16, "lr": 1e-3, "init": "default", "merge": False, "adapter_format": None}


def tuned(name="nf4", seed=0, delta=0.0, noise=0.01, untuned=0.05, **keys) -> dict:
    """A run whose tuned nll is TEXT − 1 + delta on average. keys: block, dq, or keys of the fine-tune."""
    generator = np.random.default_rng([seed, *(name + str(keys)).encode()])
    wobble = generator.normal(0, noise, len(TEXT))
    after = TEXT - 1 + delta + wobble - wobble.mean()
    more = {key: keys.pop(key) for key in ("block", "dq") if key in keys}
    return finished(name, seed, TEXT + untuned * (name != "none"), after, tune=LORA | keys, **more)


def describe(runs) -> list[str]:
    return list(findings.describe_findings(only(runs)))


@pytest.mark.parametrize(
    ("best", "edge"), [(0, "lowest"), (1, ""), (2, ""), (3, "highest")], ids=["first", "second", "third", "last"]
)
def test_a_best_learning_rate_at_an_edge_is_not_bracketed(best, edge):
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    runs = [tuned("none", 0, 0.1 * abs(i - best), lr=lr) for i, lr in enumerate(rates)]
    (series,) = methods.find_series(only(runs))
    assert series.rates == rates and series.rate == rates[best] and series.edge == edge
    (sentence,) = [s for s in describe(runs) if "learning rate of" in s]
    assert sentence.startswith(f"The best learning rate of LoRA on 16 bit is {rates[best]:g} (perplexity ")
    tried = "of 4 tried from 0.0001 to 0.1"
    assert sentence.endswith(f"), the {edge} {tried}: a better one may lie beyond." if edge else f"), {tried}.")


def test_the_best_learning_rate_is_chosen_on_the_seeds_that_all_have():
    """Otherwise a better rate could lose because it was also run on harder seeds."""
    runs = [tuned("none", 100, 0.05, lr=1e-4), tuned("none", 100, 0.0, lr=1e-3)]
    runs += [tuned("none", seed, 0.5, lr=1e-3) for seed in (0, 1)]
    (series,) = methods.find_series(only(runs))
    assert series.rate == 1e-3 and len(series.best.runs) == 3
    other = methods.find_series(only([tuned("none", 1, 0.05, lr=1e-4), tuned("none", 2, 0.0, lr=1e-3)]))
    assert other[0].rate == 1e-3, "without a seed in common, the means decide"


def test_methods_meet_each_at_its_own_learning_rate():
    """The difference is between the best configurations, paired over the seeds that both have."""
    deltas = {("none", "full", 1e-4): 0.0, ("none", "lora", 1e-3): 0.02, ("nf4", "lora", 1e-2): 0.03}
    runs = []
    for (name, method, lr), delta in deltas.items():
        runs += [tuned(name, seed, delta + 0.004 * seed, 0.05, method=method, lr=lr) for seed in (0, 1, 2)]
        runs.append(tuned(name, 0, delta + 0.5, method=method, lr=lr * 3))
    setting = only(runs)
    series = {s.title: s for s in methods.find_series(setting)}
    assert list(series) == ["full fine-tuning of 16 bit", "LoRA on 16 bit", "LoRA on nf4, block 64"]
    claims = methods.qlora_claims(setting)
    (same,), full = claims["same"], {c.ours.title: c for c in claims["full"]}
    assert same.theirs is series["LoRA on 16 bit"] and same.ours.rate == 1e-2 and same.theirs.rate == 1e-3
    assert set(full) == {"LoRA on 16 bit", "LoRA on nf4, block 64"}

    def windows(s):
        return np.array([r["metrics"]["quality"]["tuned"]["windows"] for _, (_, r) in sorted(s.best.runs.items())])

    def reference(claim):
        rows = windows(claim.ours) - windows(claim.theirs)
        errors = [np.std(rows.mean(axis), ddof=1) / rows.shape[1 - axis] ** 0.5 for axis in (0, 1)]
        return rows.mean(), math.hypot(*errors)

    for claim in (same, *full.values()):
        assert (claim.difference.delta, claim.difference.stderr) == pytest.approx(reference(claim))
    p = [2 * t.sf(abs(delta) / stderr, len(TEXT) - 1) for delta, stderr in map(reference, full.values())]
    assert [claim.difference.p for claim in full.values()] == pytest.approx(false_discovery_control(p))
    assert series["LoRA on nf4, block 64"].best.differences.get("tuned") is None, "16 bit has no run like it"


@pytest.mark.parametrize(
    ("delta", "noise", "verdict"),
    [
        (0.0051, 0.01, "fails for nf4 + dq, block 64 (7.43, +0.0051±0.00"),
        (0.0001, 0.1, "holds, as far as the test can tell, for nf4 + dq, block 64 (7.39, +0.0001±0.00"),
        (-0.02, 0.01, "is exceeded by nf4 + dq, block 64 (7.24, −0.0200±0.00"),
    ],
)
def test_the_claim_of_qlora_is_told_as_the_test_has_it(delta, noise, verdict):
    runs = [tuned("none"), tuned("nf4", 0, delta, noise, dq=True)]
    centre = TEXT - TEXT.mean() + 3
    for run in runs:  # with a perplexity that is easy to recognize
        moved = np.array(run["metrics"]["quality"]["tuned"]["windows"]) - TEXT + centre
        run["metrics"]["quality"]["tuned"] |= score(moved)
    (sentence,) = [s for s in describe(runs) if "nothing is lost" in s]
    assert sentence.startswith(f"Against LoRA on 16 bit (perplexity 7.39), the claim that nothing is lost {verdict}")
    assert "full" not in sentence


def test_a_reference_that_might_do_better_is_told():
    ours = [tuned("nf4", 0, delta, lr=lr) for delta, lr in ((0.1, 1e-4), (0.02, 1e-3), (0.1, 1e-2))]
    alone = [s for s in describe([*ours, tuned("none")]) if "nothing is lost" in s]
    assert "at the only learning rate tried), the claim" in alone[0]
    edge = [s for s in describe([*ours, tuned("none", delta=0.1, lr=1e-4), tuned("none")]) if "nothing is lost" in s]
    assert "at the highest learning rate tried), the claim" in edge[0]


def test_claims_are_cut_to_the_usual_block_and_the_table_has_all():
    runs = [tuned("none"), tuned("none", method="full")]
    runs += [tuned(n, 0, 0.1, block=block) for n in ("nf4", "int4") for block in (32, 64, 128)]
    setting = only(runs)
    claims = [s for s in findings.describe_findings(setting) if "nothing is lost" in s]
    assert len(claims) == 2 and all("block 64" in s and "block 32" not in s and "block 128" not in s for s in claims)
    (table,) = extra_tables.build_tables(setting)
    assert table.title == "Methods of fine-tuning" and len(table.rows) == 8
    heads = [column.head for column in table.columns]
    row = next(r.cells for r in table.rows if r.cells[1].text == "int4, block 128")
    assert row[heads.index("Δ nll to 16 bit")].text.startswith("+0.1000±")


def test_one_fine_tune_alone_is_not_compared_with_others():
    setting = only([tuned("none"), tuned("nf4"), tuned("int4")])
    assert not methods.has_several_fine_tunes(setting) and extra_tables.build_tables(setting) == []


def test_before_a_fine_tune_the_fine_tune_has_no_part():
    """A format with many fine-tunes is one configuration, and its test counts once."""
    many = [tuned(n, method=m) for n in ("none", "nf4") for m in ("lora", "dora", "ia3")]
    untuned = [finished(n, 0, TEXT + 0.05 * (n != "none")) for n in ("none", "nf4")]
    setting = only([*many, *untuned])
    titles = {c.title for c in setting.configurations}
    assert titles == {f"{f}, {m}" for f in ("16 bit", "nf4, block 64") for m in ("LoRA", "DoRA", "(IA)³", "untuned")}
    assert [c.title for c in setting.scored_at("quantized")] == ["16 bit", "nf4, block 64"]
    texts = findings.describe_findings(setting)
    assert (
        "0 of 1 quantized" in texts[1]
        and "0 of 3 quantized" not in texts[1]
        and "is nf4, block 64, with +5" in texts[1]
    )
    assert "(4 against 16 bit in all)" in findings.reading_note([setting])


def test_a_key_that_came_later_had_its_default_before():
    old, new = tuned("none", 0), tuned("none", 1, optimizer="adamw")
    assert "optimizer" not in old["config"]["tune"]
    (c,) = only([old, new]).configurations
    assert c.title == "16 bit" and len(c.runs) == 2


def test_without_a_format_nothing_is_said_of_formats():
    setting = only([tuned("none", lr=lr, delta=lr) for lr in (1e-3, 1e-2)])
    text = " ".join(findings.describe_findings(setting)) + findings.reading_note([setting])
    assert "quantized" not in text and "against 16 bit in all" not in text
    assert "at best" in findings.describe_setup(setting) and "after lr 0.001." in findings.describe_setup(setting)


def begun(name, init, seed, sqnr, initial, delta, alone=20.0) -> dict:
    """A run with LoRA initialized by `init`."""
    run = tuned(name, seed, delta, init=init)
    if init != "default":
        metrics = run["metrics"]
        metrics["init"] = {
            "quantized": {"sqnr_db": alone, "mse": 0.1 * bool(alone)},
            "initial": {"sqnr_db": sqnr, "mse": 0.1 * bool(sqnr)},
        }
        against = metrics["quality"]["tuned"]["against_baseline"]
        metrics["quality"]["initial"] = score(TEXT + initial) | {"against_baseline": against}
    return run


@pytest.fixture
def starts() -> list[dict]:
    """LoftQ helps before and after, PiSSA only before. On 16 bit there is no error for LoftQ to reduce."""
    runs = []
    for seed in (0, 1, 2):
        for name in ("none", "nf4", "int4"):
            runs.append(begun(name, "default", seed, None, 0, 0.1))
            none = name == "none"
            runs.append(begun(name, "loftq", seed, None if none else 22.5, 0 if none else 0.02, 0.1 if none else 0.07))
            runs.append(begun(name, "pissa", seed, 56 if none else 21, 0.01, 0.1, None if none else 20.0))
    return runs


def test_a_start_is_compared_with_none_on_the_same_format(starts):
    inits = {s.configuration.title: s for s in adapters.compare_inits(only(starts))}
    assert "16 bit, LoftQ" not in inits and len(inits) == 8
    loftq, pissa, plain = (inits[f"nf4, block 64, {init}"] for init in ("LoftQ", "PiSSA", "B = 0"))
    assert loftq.before.delta == pytest.approx(0.02 - 0.05) and loftq.before.distinguishable
    assert loftq.after.delta == pytest.approx(-0.03) and loftq.after.distinguishable
    assert pissa.before.distinguishable and not pissa.after.distinguishable
    assert plain.before is plain.after is None and plain.perplexity == pytest.approx(math.exp(TEXT.mean() + 0.05))
    assert loftq.sqnr_db == (20.0, 22.5) and loftq.perplexity == pytest.approx(math.exp(TEXT.mean() + 0.02))


def test_starts_meet_each_at_its_own_learning_rate():
    """PiSSA has its best rate lower than B = 0; at their best rates, neither is better."""
    runs = [tuned("nf4", 0, delta, lr=lr) for delta, lr in ((0.2, 1e-4), (0.1, 1e-3), (0.3, 1e-2))]
    for lr, delta in ((1e-4, 0.1), (1e-3, 0.3)):
        runs.append(begun("nf4", "pissa", 0, 21, 0.01, delta))
        runs[-1]["config"]["tune"]["lr"] = lr
    plain, pissa = adapters.compare_inits(only(runs))
    assert (plain.configuration.config["tune"]["lr"], pissa.configuration.config["tune"]["lr"]) == (1e-3, 1e-4)
    assert not pissa.after.distinguishable and any(
        "PiSSA is compared with B = 0, each at its best" in s for s in describe(runs)
    )


def test_whether_a_start_pays_is_told(starts):
    texts = [s for s in describe(starts) if "compared with B = 0" in s]
    loftq, pissa = sorted(texts)
    assert loftq.startswith(
        "LoftQ is compared with B = 0. The SQNR of Q + B·A is 2.50 dB above that of Q alone. Before the first"
    )
    assert "is worse in 0, better in 2 and not distinguishable in 0 of 2 pairs (−2.96% on average)" in loftq
    assert "After the fine-tune, it helps on int4, block 64 (−2.96% ± 0.0" in loftq
    assert "makes no distinguishable difference on 16 bit; int4, block 64; nf4, block 64." in pissa
    (table,) = extra_tables.build_tables(only(starts))
    assert table.title == "Initialization of LoRA" and [row.cells[1].text for row in table.rows][:5] == [
        "B = 0", "PiSSA", "B = 0", "LoftQ", "PiSSA",
    ]  # fmt: skip


def test_a_start_without_its_like_is_told_of_alone():
    run = begun("nf4", "loftq", 0, 22.5, 0.02, 0.07)
    (text,) = [s for s in describe([run, tuned("none")]) if s.startswith("LoftQ")]
    assert text.endswith("2.50 dB above that of Q alone. No run with B = 0 is otherwise the same.")


def kept(name, seed, **deltas) -> dict:
    """A run whose adapters were packed and merged. deltas: by kind, the loss against separate adapters."""
    run = tuned(name, seed, 0.01 * seed, merge=True, adapter_format="int8")
    metrics = run["metrics"]
    metrics["bits"]["parameters"] = 8_000_000
    metrics["memory"]["tuned_bytes"] = 6_000_000
    bits = {"adapters": 5.5, "16bit": 16.0, "requantized": 5.0}
    windows = np.array(metrics["quality"]["tuned"]["windows"])
    noise = np.random.default_rng(seed).normal(0, 0.001, len(windows))
    against = {"against_baseline": metrics["quality"]["tuned"]["against_baseline"]}
    against["against_unmerged"] = {"delta_nll": 0.0, "stderr": 0.0, "p": 1.0}
    metrics["merged"] = {
        kind: score(windows + delta + noise) | against | {"bits": {"model": bits[kind]}, "bytes": int(bits[kind] * 1e6)}
        for kind, delta in deltas.items()
    }
    return run


@pytest.fixture
def merged() -> list[dict]:
    runs = [
        kept(n, seed, adapters=0.0, requantized=0.04 + 0.03 * seed, **{"16bit": 1e-6})
        for n in ("nf4",)
        for seed in (0, 1)
    ]
    return [*runs, tuned("none"), tuned("none", 1)]


def test_merged_adapters_are_compared_with_those_kept_apart(merged):
    rows = {row.name if not row.is_separate else "": row for row in adapters.compare_merged(only(merged))}
    assert list(rows) == ["", "A, B in int8", "requantized", "merged"]
    apart, again = rows[""], rows["requantized"]
    assert apart.bits == 6.0 and again.bits == 5.0 and again.model_bytes == 5_000_000 and apart.against is None
    assert again.against.delta == pytest.approx(0.055, abs=1e-4) and again.against.stderr == pytest.approx(
        0.015, rel=0.01
    )
    assert not rows["A, B in int8"].against.distinguishable and not rows["merged"].against.distinguishable
    tune = [run["metrics"]["merged"]["requantized"]["perplexity"] for run in merged[:2]]
    assert again.perplexity == pytest.approx(np.mean(tune))


def test_what_merging_costs_is_told(merged):
    texts = describe(merged)
    assert any(
        s.startswith("Merged into 16 bit, the model takes 16.000 bits per parameter, against 6.000") for s in texts
    )
    (again,) = [s for s in texts if s.startswith("Merged and quantized again, the model takes 5.000 bits")]
    assert "worse in 1, better in 0" in again
    assert (
        "The largest loss is on nf4, block 64, adapters in int8, merged: +5.65% ± 1.58% (5% of what the fine-tune won)."
        in again
    )
    assert any("With A, B in int8" in s and "not distinguishable in 1 of 1 configuration (" in s for s in texts)
    assert not any("Merged" in s for s in describe([tuned("none"), tuned("nf4")]))


def test_in_16_bit_again_is_in_16_bit():
    rows = adapters.compare_merged(only([kept("none", 0, requantized=0.0, **{"16bit": 0.0})]))
    assert [row.kind for row in rows] == ["", "16bit"]


def test_what_is_measured_afterwards_has_no_part_in_the_fine_tune(merged):
    """A run with merged adapters is compared with a 16-bit run without."""
    nf4 = next(c for c in only(merged).configurations if c.format == "nf4")
    assert nf4.differences["tuned"].delta == pytest.approx(0.005, abs=0.002)


def test_the_page_of_it_all(starts, merged, tmp_path):
    for run in [*starts, *merged]:
        run["config"]["tune"] |= {"merge": False, "adapter_format": "int8"}  # the same fine-tunes, in one comparison
    more = [tuned(n, s, d, method=m, lr=lr, adapter_format="int8") for n, m, lr, d in (
        ("none", "full", 1e-4, 0.0), ("none", "full", 1e-3, 0.1), ("none", "full", 1e-2, 0.4), ("nf4", "lora", 1e-2, 0.2),
        ("nf4", "lora", 1e-4, 0.3), ("none", "ia3", 1e-2, 0.3),
    ) for s in (0, 1)]  # fmt: skip
    for i, run in enumerate([*starts, *merged, *more]):
        store.write(tmp_path / str(i), run)
    written = page.write(page.collect(tmp_path), tmp_path / "report")
    html, twin = written.read_text(), written.with_suffix(".md").read_text()
    for title in ("Methods of fine-tuning", "Initialization of LoRA", "Merged and packed adapters"):
        assert f"<h3>{title}</h3>" in html and f"### {title}\n\n| " in twin
    drawn = {file.stem for file in (tmp_path / "report/figures").iterdir()}
    assert {"learning_rates", "methods", "initialisation", "slopes", "pareto"} <= drawn
    assert browsed(Path(written)) == {"wrong": "", "asked": "0", "wide": "0"}
