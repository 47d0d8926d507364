"""What a run is told: typed, checked, and the same from a command line or a notebook."""

from dataclasses import asdict, dataclass, field

from formats import Format

from .errors import integer
from .tune import TuneSettings


@dataclass(frozen=True)
class ModelSettings:
    """path: a folder or a hub id, None the bundled model. dtype: auto, bfloat16, float16 or float32."""

    path: str | None = None
    dtype: str = "auto"
    revision: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """path: a text file, or the name of a bundled text. seq: tokens a window; `auto` is 256, or what the model can."""

    path: str = "kjv"
    seq: int | str = "auto"

    def __post_init__(self):
        if self.seq != "auto":
            integer("data.seq", self.seq, at_least=2)


@dataclass(frozen=True)
class EvalSettings:
    """tokens: held-out tokens that are scored, rounded up to whole windows."""

    tokens: int = 16384

    def __post_init__(self):
        integer("eval.tokens", self.tokens)


@dataclass(frozen=True)
class Settings:
    """All that a run depends on. tune: None to leave the fine-tuning out."""

    format: Format
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tune: TuneSettings | None = field(default_factory=TuneSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self):
        integer("seed", self.seed, at_least=0)

    def plain(self, **found: str | int) -> dict:
        """The configuration as JSON holds it; `found` tells device, dtype and seq once they are no longer `auto`."""
        model, data = asdict(self.model), asdict(self.data)
        return {
            "format": {"name": self.format.name, "source": self.format.source},
            "block": self.format.block,
            "dq": self.format.dq,
            "seed": self.seed,
            "device": found.get("device", self.device),
            "model": {**model, "dtype": found.get("dtype", self.model.dtype)},
            "data": {**data, "seq": found.get("seq", self.data.seq)},
            "tune": asdict(self.tune) if self.tune else {"method": "none"},
            "eval": asdict(self.eval),
        }
