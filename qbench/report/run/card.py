"""README.md in the folder of trained adapters: their base model, their scores, and how to load them.

Run in that folder, the code on the card loads the model that was measured.
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

    arguments: those of `formats.get` for the format of the run.
    """
    if (folder / CONFIG).is_file():
        base = json.loads((folder / CONFIG).read_text("utf-8"))["base_model_name_or_path"]
        (folder / "README.md").write_text("\n".join(_card_lines(base, sanitize_all(result), arguments)) + "\n", "utf-8")


def _card_lines(base: str, result: dict, arguments: Mapping) -> Iterator[str]:
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
    yield from ("", "## Loading", "", *_loading_section(base, result, arguments), "")
    yield from ("## Versions", "", ", ".join(f"{name} {versions.get(name)}" for name in LIBRARIES), "")
    yield from ("## License", "", "To be filled in when these adapters are published.")


def _loading_section(base: str, result: dict, arguments: Mapping) -> Iterator[str]:
    """How to load the adapters on the packed model, and on a dequantized one."""
    config = result["config"]
    dtype, commit = f"dtype=torch.{config['model']['dtype']}", result["run"]["model"]["commit"]
    source = f"{json.dumps(base)}, {f'revision={json.dumps(commit)}, ' if commit else ''}{dtype}"
    package = arguments["name"].rpartition(".")[0]  # of a format from another package
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
