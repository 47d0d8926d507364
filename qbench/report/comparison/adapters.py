"""How LoRA's A and B were initialized, and what packing or merging them costs.

Each is compared with the plain run on the same seeds: B = 0 at the start, separate adapters at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qbench.report.wording import INITS, MERGED, merged_scores, recipe_name, shorten

from .configurations import Configuration, Setting
from .differences import Difference, compare_windows, correct_p_values
from .methods import find_series

PLAIN = "default"  #: the initialization with B = 0


@dataclass(frozen=True)
class Init:
    """The initialization of a configuration.

    before, after: the difference from B = 0 before the first step and after the last, with corrected p. They are None for
    B = 0 itself, and where no such run has the same format and fine-tune. Learning rates may differ.
    """

    configuration: Configuration
    before: Difference | None
    after: Difference | None

    @property
    def name(self) -> str:
        return _init_of(self.configuration)

    @property
    def sqnr_db(self) -> tuple[float | None, float | None]:
        """The SQNR of Q alone and of Q + B·A; None if there is no error."""
        c = self.configuration
        if self.name == PLAIN:
            return (c.mean("error", "sqnr_db"),) * 2
        return c.mean("init", "quantized", "sqnr_db"), c.mean("init", "initial", "sqnr_db")

    @property
    def perplexity(self) -> float | None:
        """The perplexity before the first step."""
        return self.configuration.mean("quality", _first_stage(self.configuration), "perplexity")


@dataclass(frozen=True)
class MergedAdapters:
    """The trained adapters of a configuration in one of their forms.

    kind: "" for separate adapters, else a key of `wording.MERGED`. against: the difference from separate adapters, with
    corrected p.
    """

    configuration: Configuration
    kind: str
    against: Difference | None = None

    @property
    def name(self) -> str:
        if self.kind == "adapters":
            return f"A, B in {shorten(str(self.configuration.config['tune'].get('adapter_format')))}"
        return MERGED[self.kind]

    @property
    def is_separate(self) -> bool:
        return not self.kind

    @property
    def perplexity(self) -> float | None:
        return self.configuration.mean(*self._keys, "perplexity")

    @property
    def model_bytes(self) -> float | None:
        keys = ("memory", "tuned_bytes") if self.is_separate else (*self._keys, "bytes")
        return self.configuration.mean(*keys)

    @property
    def bits(self) -> float | None:
        """Bits per parameter of the whole model with its adapters. The parameters are those without adapters."""
        parameters = self.configuration.mean("bits", "parameters")
        if self.is_separate:
            return 8 * self.model_bytes / parameters if self.model_bytes and parameters else None
        return self.configuration.mean(*self._keys, "bits", "model")

    @property
    def _keys(self) -> tuple[str, ...]:
        """The keys of the scores in the metrics."""
        return ("quality", "tuned") if self.is_separate else ("merged", self.kind)


def compare_inits(setting: Setting) -> list[Init]:
    """Every configuration with another initialization than B = 0, after the one with B = 0 that it is compared with.

    Each is at its own best learning rate, because the initialization affects which rate is best. LoftQ on 16 bit is left
    out: there is no quantization error to compensate, so it equals B = 0.
    """
    configurations = [s.best for s in find_series(setting)]
    plain = {_same_but_init(c): c for c in configurations if _init_of(c) == PLAIN}
    others = [c for c in configurations if _init_of(c) != PLAIN and c.mean("init", "initial", "mse") != 0]
    pairs = [(c, plain.get(_same_but_init(c))) for c in others]
    before = [
        compare_windows(c.windows("quality", _first_stage(c)), base.windows("quality", _first_stage(base)))
        if base
        else None
        for c, base in pairs
    ]
    after = [
        compare_windows(c.windows("quality", "tuned"), base.windows("quality", "tuned")) if base else None
        for c, base in pairs
    ]
    families = correct_p_values(before), correct_p_values(after)
    inits = [Init(*row) for row in zip(others, *families, strict=True)]
    inits += [Init(base, None, None) for base in dict.fromkeys(base for _, base in pairs if base)]
    return sorted(inits, key=_sort_key)


def _sort_key(init: Init) -> tuple:
    c = init.configuration
    return not c.is_16_bit, recipe_name(c.config), _same_but_init(c), [*INITS, init.name].index(init.name)


def _same_but_init(c: Configuration) -> tuple[str, str]:
    """A fingerprint of everything but the initialization and the learning rate."""
    return c.recipe, c.fine_tune("init", "init_rounds", "lr")


def _init_of(c: Configuration) -> str:
    return c.config["tune"].get("init", PLAIN)


def _first_stage(c: Configuration) -> str:
    """The stage scored before the first step. With B = 0 the model is then the quantized one."""
    return "quantized" if _init_of(c) == PLAIN else "initial"


def compare_merged(setting: Setting) -> list[MergedAdapters]:
    """For each configuration whose adapters were packed or merged: the separate adapters, then each other form."""
    configurations = [_only_merged_runs(c) for c in setting.scored_at("tuned") if _merged_kinds(c)]
    pairs = [(c, kind) for c in configurations for kind in _merged_kinds(c)]
    family = correct_p_values(
        [compare_windows(c.windows("merged", kind), c.windows("quality", "tuned")) for c, kind in pairs]
    )
    merged = [MergedAdapters(*pair, d) for pair, d in zip(pairs, family, strict=True)]
    rows = []
    for c in configurations:
        rows += [MergedAdapters(c, ""), *(m for m in merged if m.configuration is c)]
    return rows


def _only_merged_runs(c: Configuration) -> Configuration:
    """The configuration with only the runs that have merged scores, so that all means are over the same seeds."""
    return replace(c, runs={seed: run for seed, run in c.runs.items() if merged_scores(run[1]["metrics"])})


def _merged_kinds(c: Configuration) -> Sequence[str]:
    """The kinds that were measured. Requantizing to 16 bit changes nothing, so it is left out."""
    kinds = dict.fromkeys(kind for result in c.results for kind in merged_scores(result["metrics"]))
    return [kind for kind in kinds if not (kind == "requantized" and c.is_16_bit)]
