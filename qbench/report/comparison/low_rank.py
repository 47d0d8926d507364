"""Where LoRA began, and what became of its matrices: each beside the run that did the plain thing, with the same seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qbench.report.wording import INITS, MERGED, merged, short, title

from .configurations import Configuration, Setting
from .differences import Difference, corrected, paired
from .methods import series

PLAIN = "default"  #: B at zero


@dataclass(frozen=True)
class Start:
    """A configuration by where it began. before, after: the difference, corrected, before the first step and after the
    last, from the one that began at B = 0 and is like it in all else but the learning rate; None where there is none, and
    of that one itself.
    """

    configuration: Configuration
    before: Difference | None
    after: Difference | None

    @property
    def init(self) -> str:
        return init(self.configuration)

    @property
    def sqnr_db(self) -> tuple[float | None, float | None]:
        """Of Q alone and of Q + B·A, None where there is no error."""
        c = self.configuration
        if self.init == PLAIN:
            return (c.mean("error", "sqnr_db"),) * 2
        return c.mean("init", "quantized", "sqnr_db"), c.mean("init", "initial", "sqnr_db")

    @property
    def perplexity(self) -> float | None:
        """Before the first step."""
        return self.configuration.mean("quality", _first(self.configuration), "perplexity")


@dataclass(frozen=True)
class Afterwards:
    """The adapters of a configuration: kept apart, or as `kind` has them (`words.MERGED`). against: those kept apart,
    corrected."""

    configuration: Configuration
    kind: str
    against: Difference | None = None

    @property
    def name(self) -> str:
        if self.kind == "adapters":
            return f"A, B in {short(str(self.configuration.config['tune'].get('adapter_format')))}"
        return MERGED[self.kind]

    @property
    def apart(self) -> bool:
        return not self.kind

    @property
    def perplexity(self) -> float | None:
        return self.configuration.mean(*self._place, "perplexity")

    @property
    def held(self) -> float | None:
        """Bytes of the whole model."""
        place = ("memory", "tuned_bytes") if self.apart else (*self._place, "bytes")
        return self.configuration.mean(*place)

    @property
    def bits(self) -> float | None:
        """A parameter of the whole model, before the fine-tune added its own."""
        parameters = self.configuration.mean("bits", "parameters")
        if self.apart:
            return 8 * self.held / parameters if self.held and parameters else None
        return self.configuration.mean(*self._place, "bits", "model")

    @property
    def _place(self) -> tuple[str, ...]:
        return ("quality", "tuned") if self.apart else ("merged", self.kind)


def init(c: Configuration) -> str:
    return c.config["tune"].get("init", PLAIN)


def starts(setting: Setting) -> list[Start]:
    """Every configuration that began elsewhere than at B = 0, after the one that it is compared with; each at its best
    learning rate, for a start has a part in which that is.

    LoftQ on 16 bit is none: without an error to make up for it begins at B = 0.
    """
    some = [s.best for s in series(setting)]
    plain = {_alike(c): c for c in some if init(c) == PLAIN}
    others = [c for c in some if init(c) != PLAIN and c.mean("init", "initial", "mse") != 0]
    pairs = [(c, plain.get(_alike(c))) for c in others]
    before = corrected(
        [paired(c.windows("quality", _first(c)), b.windows("quality", _first(b))) if b else None for c, b in pairs]
    )
    after = corrected(
        [paired(c.windows("quality", "tuned"), b.windows("quality", "tuned")) if b else None for c, b in pairs]
    )
    bases = dict.fromkeys(b for _, b in pairs if b)
    rows = [Start(*row) for row in zip(others, before, after, strict=True)] + [Start(b, None, None) for b in bases]
    return sorted(rows, key=_order)


def _order(s: Start) -> tuple:
    c = s.configuration
    return not c.is_16_bit, title(c.config), _alike(c), [*INITS, s.init].index(s.init)


def _alike(c: Configuration) -> tuple[str, str]:
    return c.recipe, c.fine_tune("init", "init_rounds", "lr")


def _first(c: Configuration) -> str:
    """The stage before the first step, where with B = 0 the model is the quantized one."""
    return "quantized" if init(c) == PLAIN else "initial"


def afterwards(setting: Setting) -> list[Afterwards]:
    """What was measured of trained adapters, a row a configuration and kind, after the adapters kept apart."""
    some = [_measured(c) for c in setting.at("tuned") if _kinds(c)]
    pairs = [(c, kind) for c in some for kind in _kinds(c)]
    family = corrected([paired(c.windows("merged", kind), c.windows("quality", "tuned")) for c, kind in pairs])
    measured = [Afterwards(*pair, d) for pair, d in zip(pairs, family, strict=True)]
    return [row for c in some for row in (Afterwards(c, ""), *(m for m in measured if m.configuration is c))]


def _measured(c: Configuration) -> Configuration:
    """With the runs alone whose adapters were measured, for the means to be over the same seeds."""
    return replace(c, runs={seed: (file, r) for seed, (file, r) in c.runs.items() if merged(r["metrics"])})


def _kinds(c: Configuration) -> Sequence[str]:
    """Of what was measured; in the format of 16 bit again, merged adapters are as they were."""
    found = dict.fromkeys(kind for _, r in c.runs.values() for kind in merged(r["metrics"]))
    return [kind for kind in found if not (kind == "requantized" and c.is_16_bit)]
