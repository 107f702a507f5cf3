"""
`python model.py RUN --export DIR`: a folder that works without this repository, for Hugging Face's
transformers (the extra `export`), or to be put on their hub as it is.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import report
from checkpoint import CheckpointError

HERE = Path(__file__).parent
USAGE = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
ids = tokenizer("def main(", return_tensors="pt").input_ids  # begins with <|bos|>
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
```

`trust_remote_code` runs `model.py` and `modeling_onedial.py` of this folder. `generate` reads the whole row
anew for each token; `model.gpt.generate(ids.tolist(), BOS, 50)` keeps what it has read, and yields new ids.
"""


def export(target, model, tokenizer, run_folder):
    """Write the folder `target`, whole or not at all -> its path. CheckpointError if it exists."""
    if target.exists():
        raise CheckpointError(f"{target} exists.\nGive a folder that does not, or move it away.")
    try:
        import safetensors.torch
        import transformers
    except ImportError as error:
        raise CheckpointError(f'--export takes {error.name}.\npip install ".[export]"') from None
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        weights = {f"gpt.{name}": p.contiguous() for name, p in model.cpu().state_dict().items()}
        content = safetensors.torch.save(weights, metadata={"format": "pt"})
        (temporary / "model.safetensors").write_bytes(content)
        convert(tokenizer, run_folder, transformers).save_pretrained(temporary)
        for name, content in settings(model, tokenizer).items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        shutil.copy(HERE / "modeling_onedial.py", temporary)
        source = (HERE.parent / "model.py").read_text(encoding="utf-8")
        source = source[: source.index("# " + "-" * 77 + "\n# The command line")]  # it needs the other files
        (temporary / "model.py").write_text(source.rstrip() + "\n", encoding="utf-8")
        card = model_card(report.Run(run_folder), temporary, tokenizer.n_vocab - 1)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def settings(model, tokenizer):
    """{name of a file: its content} for what transformers reads beside weights and tokenizer."""
    ends = {"bos_token_id": tokenizer.n_vocab - 1, "eos_token_id": tokenizer.n_vocab - 1}
    places = {"AutoConfig": "OnedialConfig", "AutoModelForCausalLM": "OnedialForCausalLM"}
    config = {"model_type": "onedial", "architectures": ["OnedialForCausalLM"], "dtype": "float32"}
    config |= {"auto_map": {auto: f"modeling_onedial.{name}" for auto, name in places.items()}}
    config |= {"gpt": asdict(model.config), "use_cache": False, **ends}
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 50, "max_new_tokens": 200}
    return {"config.json": config, "generation_config.json": {**sampling, "use_cache": False, **ends}}


def convert(tokenizer, run_folder, transformers):
    """The run's tokenizer as one of Hugging Face's `tokenizers`, which puts a bos before each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ((bos, number),) = tokenizer._special_tokens.items()
    file = str(run_folder / "tokenizer" / "tokenizer.tiktoken")
    converter = TikTokenConverter(vocab_file=file, pattern=tokenizer._pat_str, extra_special_tokens=[bos])
    converted = converter.converted()
    assert converted.token_to_id(bos) == number
    template = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B", "special_tokens": [(bos, number)]}
    converted.post_processor = TemplateProcessing(**template)
    ends = {"bos_token": bos, "eos_token": bos, "clean_up_tokenization_spaces": False}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=converted, **ends)


def model_card(run, folder, bos):
    """README.md: how to use the model, its figures, and its curves, which are drawn into `folder`."""
    alone, settings = [report.Group([run])], run.config["settings"]
    usage = USAGE.replace("DIR", '"."').replace("BOS", str(bos))
    size = f"depth {settings['depth']}, {sum(run.config['num_params'].values()):,} parameters"
    about = f"A GPT of {size}, trained on `{settings['data']}` by onedial."
    parts = ["---\nlibrary_name: transformers\npipeline_tag: text-generation\n---", f"# {run.name}", about]
    parts += [usage.strip(), "## Figures", report.results(alone), report.show_curves(alone, folder)]
    parts += ["## How it was trained", report.how_to_repeat(run)]
    return "\n\n".join(parts) + "\n"
