"""The card of a fine-tune's adapters, README.md in their folder: what they belong to, what was measured, how to load them.

The code on it loads what was measured, if it is run in that folder.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from qbench.report import wording
from qbench.system.messages import all_visible

CONFIG = "adapter_config.json"
LIBRARIES = ("qbench", "torch", "transformers", "peft")
_LOAD = """```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
{imports}
base = AutoModelForCausalLM.from_pretrained({source})
{more}model = PeftModel.from_pretrained(base, ".").eval()
```"""


def write(folder: Path, result: dict, arguments: Mapping) -> None:
    """Write the card of the adapters in `folder`, if it holds any. arguments: what `formats.get` takes for the format of
    the run that left `result`."""
    if (folder / CONFIG).is_file():
        base = json.loads((folder / CONFIG).read_text("utf-8"))["base_model_name_or_path"]
        (folder / "README.md").write_text("\n".join(_lines(base, all_visible(result), arguments)) + "\n", "utf-8")


def _lines(base: str, result: dict, arguments: Mapping) -> Iterator[str]:
    config, versions = result["config"], result["environment"]["versions"]
    model = config["model"]["path"] or "the bundled model of qbench"
    method = wording.method(config["tune"])
    yield from ("---", f"base_model: {json.dumps(model)}", "library_name: peft", "pipeline_tag: text-generation")
    yield "license:  # yours to fill in, as far as the base model's and the text's allow"
    yield from ("---", "", f"# {method} on {wording.escaped(model)} in {wording.escaped(wording.title(config))}", "")
    yield f"{config['tune']['steps']} steps on {wording.escaped(config['data']['path'])}. Perplexity of held-out text:"
    yield from ("", "| model | perplexity |", "|---|---|")
    scores = result["metrics"]["quality"]
    yield from (
        f"| {stage} | {wording.number(scores[stage]['perplexity'], '.2f')} |"
        for stage in wording.STAGES
        if stage in scores
    )
    yield from ("", "## Loading", "", *_loading(base, result, arguments), "")
    yield from ("## Versions", "", ", ".join(f"{name} {versions.get(name)}" for name in LIBRARIES), "")
    yield from ("## Licence", "", "To be filled in by whoever publishes these adapters.")


def _loading(base: str, result: dict, arguments: Mapping) -> Iterator[str]:
    """How they are loaded on the packed model, and on a plain one; from the folder that they are in."""
    config = result["config"]
    dtype, commit = f"dtype=torch.{config['model']['dtype']}", result["run"]["model"]["commit"]
    source = f"{json.dumps(base)}, {f'revision={json.dumps(commit)}, ' if commit else ''}{dtype}"
    module = arguments["name"].rpartition(".")[0]  # of a format of another package
    imports = f"\nimport {module}" if module else ""
    if "init" in result["metrics"]:
        belong = (
            f"They began as {wording.INITS[config['tune']['init']]}: they belong to the packed model in `base/` alone."
        )
        imports, source = f"{imports}\nimport qbench  # by which transformers loads packed models\n", f'"base", {dtype}'
    elif config["format"]["name"] == "none":
        yield from ("In this folder:", "", _LOAD.format(imports="", source=source, more=""))
        return
    else:
        belong = f"They belong to the base in {wording.escaped(wording.title(config))}, not to that in 16 bit."
        options = "".join(f", {key}={value!r}" for key, value in arguments.items() if key != "name")
        imports = f"{imports}\nfrom qbench import QBenchConfig\n"
        source = f"\n    {source},\n    quantization_config=QBenchConfig({arguments['name']!r}{options}),\n"
    yield from (f"{belong} In this folder:", "", _LOAD.format(imports=imports, source=source, more=""), "")
    yield "In plain PEFT, on dequantized weights; `base.save_pretrained` writes them for those who have no qbench:"
    yield from ("", _LOAD.format(imports=imports, source=source, more="base = base.dequantize()\n"))
