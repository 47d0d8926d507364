"""README.md in the folder of trained adapters: what they belong to, what was measured, how to load them.

The code on the card loads what was measured when it is run in that folder.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from qbench.report.wording import INITS, STAGES, escape_markdown, format_number, method_name, recipe_name
from qbench.system.messages import sanitize_all

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
    """Write the card of the adapters in `folder`, if there are any.

    arguments: what `formats.get` takes for the format of the run.
    """
    if (folder / CONFIG).is_file():
        base = json.loads((folder / CONFIG).read_text("utf-8"))["base_model_name_or_path"]
        (folder / "README.md").write_text("\n".join(_lines(base, sanitize_all(result), arguments)) + "\n", "utf-8")


def _lines(base: str, result: dict, arguments: Mapping) -> Iterator[str]:
    config, versions, scores = result["config"], result["environment"]["versions"], result["metrics"]["quality"]
    model = config["model"]["path"] or "the bundled model of qbench"
    titles = method_name(config["tune"]), escape_markdown(model), escape_markdown(recipe_name(config))
    yield from ("---", f"base_model: {json.dumps(model)}", "library_name: peft", "pipeline_tag: text-generation")
    yield "license:  # choose one that the licenses of the base model and of the text allow"
    yield from ("---", "", "# {} on {} in {}".format(*titles), "")
    yield f"{config['tune']['steps']} steps on {escape_markdown(config['data']['path'])}. Perplexity on held-out text:"
    yield from ("", "| model | perplexity |", "|---|---|")
    for stage in STAGES:
        if stage in scores:
            yield f"| {stage} | {format_number(scores[stage]['perplexity'], '.2f')} |"
    yield from ("", "## Loading", "", *_loading(base, result, arguments), "")
    yield from ("## Versions", "", ", ".join(f"{name} {versions.get(name)}" for name in LIBRARIES), "")
    yield from ("## License", "", "Whoever publishes these adapters fills this in.")


def _loading(base: str, result: dict, arguments: Mapping) -> Iterator[str]:
    """How to load the adapters on the packed model, and on a dequantized one."""
    config = result["config"]
    dtype, commit = f"dtype=torch.{config['model']['dtype']}", result["run"]["model"]["commit"]
    source = f"{json.dumps(base)}, {f'revision={json.dumps(commit)}, ' if commit else ''}{dtype}"
    package = arguments["name"].rpartition(".")[0]  # where a format of another package is
    imports = f"\nimport {package}" if package else ""
    if "init" in result["metrics"]:
        init = INITS[config["tune"]["init"]]
        note = f"They were initialized by {init}, so they fit only the packed model in `base/`."
        imports, source = f"{imports}\nimport qbench  # lets transformers load packed models\n", f'"base", {dtype}'
    elif config["format"]["name"] == "none":
        yield from ("In this folder:", "", _LOAD.format(imports="", source=source, more=""))
        return
    else:
        note = f"They were trained on the base model in {escape_markdown(recipe_name(config))}, not in 16 bit."
        options = "".join(f", {key}={value!r}" for key, value in arguments.items() if key != "name")
        imports = f"{imports}\nfrom qbench import QBenchConfig\n"
        source = f"\n    {source},\n    quantization_config=QBenchConfig({arguments['name']!r}{options}),\n"
    yield from (f"{note} In this folder:", "", _LOAD.format(imports=imports, source=source, more=""), "")
    yield "With plain PEFT on dequantized weights (`base.save_pretrained` writes them for those without qbench):"
    yield from ("", _LOAD.format(imports=imports, source=source, more="base = base.dequantize()\n"))
