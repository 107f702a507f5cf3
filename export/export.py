"""
What `python sample.py RUN --export DIR` writes: a folder for Hugging Face's transformers that does not need
this repository and can be uploaded to their hub. Needs the extra `export`. model.py is copied unchanged.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).parent
CARD = """
---
library_name: transformers
pipeline_tag: text-generation
# license: mit
---

# {name}

{about}

**License: not chosen yet.** The author replaces this line, and `# license: mit` at the top of this file.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
ids = tokenizer("def main(", return_tensors="pt").input_ids  # starts with <|bos|>
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
```

`trust_remote_code` runs `model.py` and `modeling_onedial.py` of this folder. The model reads {max_seq_len}
tokens at most. `generate` cuts a longer row to `<|bos|>` and its last {kept} tokens, and goes on.

Score it with EleutherAI's lm-evaluation-harness. For bits per byte (rolling tasks) add `,add_bos_token=False`
to the model's arguments: otherwise each document's `<|bos|>` is counted as text, too.

```bash
lm_eval run --model hf --model_args pretrained=.,trust_remote_code=True --tasks hellaswag
```

{figures}
"""


class ExportError(Exception):
    """User-fixable error. The message has two lines: what is wrong, and how to fix it."""

    exit_status = 2


def write_export(target, model, tokenizer, tokenizer_file, name, about, figures):
    """
    Write the folder `target`, either completely or not at all -> target.

    tokenizer: a tiktoken Encoding with one special token, saved in tokenizer_file; name, about: heading and
    first sentence of the model card; figures: function(folder) -> the rest of the card in markdown, which may
    draw pictures into that folder. Raises ExportError if target exists or a package is missing.
    """
    if target.exists():
        raise ExportError(f"{target} exists.\nGive a new folder, or move that one away.")
    try:
        import safetensors.torch
        import transformers
    except ImportError as error:
        raise ExportError(f'--export needs {error.name}.\nRun pip install ".[export]".') from None
    temporary = target.with_name(f".tmp-{os.getpid()}")  # target may have the longest name possible
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        weights = {f"gpt.{key}": p.contiguous() for key, p in model.cpu().state_dict().items()}
        content = safetensors.torch.save(weights, metadata={"format": "pt"})
        (temporary / "model.safetensors").write_bytes(content)
        with tempfile.TemporaryDirectory() as folder:  # only here can it save if target is not valid Unicode
            arguments = tokenizer, tokenizer_file, model.config.max_seq_len, transformers
            convert_tokenizer(*arguments).save_pretrained(folder)
            for file in Path(folder).iterdir():
                shutil.copy(file, temporary)
        for file, content in json_files(model, tokenizer).items():
            (temporary / file).write_text(json.dumps(content, indent=2) + "\n")
        shutil.copy(HERE / "modeling_onedial.py", temporary)
        shutil.copy(HERE.parent / "model.py", temporary)
        T = model.config.max_seq_len
        facts = {
            "name": name,
            "about": about,
            "max_seq_len": T,
            "kept": T // 2,
            "figures": figures(temporary),
        }
        card = CARD.lstrip().format(**facts).encode("utf-8", "backslashreplace")
        (temporary / "README.md").write_bytes(card)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def json_files(model, tokenizer):
    """{file name: content} of the JSON files that transformers reads for model and generation."""
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.n_vocab - 1)
    classes = {"AutoConfig": "OnedialConfig", "AutoModelForCausalLM": "OnedialForCausalLM"}
    config = {"model_type": "onedial", "architectures": ["OnedialForCausalLM"], "dtype": "float32"}
    config |= {"auto_map": {auto: f"modeling_onedial.{name}" for auto, name in classes.items()}}
    config |= {"gpt": asdict(model.config), **special}
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 50}  # no length: it would win over max_length
    return {"config.json": config, "generation_config.json": {**sampling, **special}}


def convert_tokenizer(tokenizer, tokenizer_file, max_seq_len, transformers):
    """The tiktoken Encoding as a fast tokenizer of transformers, which puts a bos before each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers.convert_slow_tokenizer import TikTokenConverter

    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # otherwise it returns what this path contained the first time
    ((bos, number),) = tokenizer._special_tokens.items()
    options = {"pattern": tokenizer._pat_str, "extra_special_tokens": [bos]}
    converted = TikTokenConverter(vocab_file=str(tokenizer_file), **options).converted()
    assert converted.token_to_id(bos) == number
    template = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B", "special_tokens": [(bos, number)]}
    converted.post_processor = TemplateProcessing(**template)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), bos)
    options = {"padding_side": "left", "model_max_length": max_seq_len, "clean_up_tokenization_spaces": False}
    options["model_input_names"] = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=converted, **special, **options)
