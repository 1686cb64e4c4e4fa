"""Coverage-guided fuzzing of what reads files of others; needs `pip install atheris`.

python -m tests.tools.fuzz_readers file|header|index|adapter|recipe|card [CORPUS...] [-max_total_time=600 ...]
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ties_ray", "json", "ruamel.yaml"]):
    from tests.tools import hostile
    from ties_ray import safetensors

_HEADER = safetensors.build([("a", "F32", (2,)), ("b", "BF16", (2, 2)), ("c", "U8", (0,))], {"format": "pt"}).rstrip()[
    8:
]
SEEDS = {
    "file": [len(_HEADER).to_bytes(8, "little") + _HEADER + bytes(16)],
    "header": [_HEADER],
    "index": [b'{"weight_map": {"w": "model.safetensors"}}\n{"model_type": "llama", "tie_word_embeddings": true}'],
    "adapter": [
        b'{"peft_type": "LORA", "r": 1, "lora_alpha": 2, "rank_pattern": {"a": 1}, "alpha_pattern": {"a.*": 3},'
        b' "use_rslora": true, "modules_to_save": null, "target_modules": ["a"], "init_lora_weights": "pissa_niter_4"}'
    ],
    "recipe": [
        b"base: /b\nmodels: [/m, {path: /n, weight: 2}]\nmethod: {name: ties, density: 0.3}\noutput: /o\n",
        b"a: &a [1]\nb: {<<: {x: *a}}\nrun: {executor: local, memory: 1GB}\nstorage: {s3: {region: x}}\n",
    ],
    "card": [b"---\nlicense: mit\nlicense_name: [a, b]\n---\n"],
}


def main() -> None:
    target, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(SEEDS[target]):
            (Path(corpus) / str(number)).write_bytes(seed)
        dictionary = Path(corpus) / "dictionary"
        entries = ("".join(f"\\x{byte:02x}" for byte in token) for token in hostile.TOKENS if token)
        dictionary.write_text("".join(f'"{entry}"\n' for entry in entries))
        flags = [f"-dict={dictionary}", *arguments, corpus]
        atheris.Setup([sys.argv[0], *flags], lambda content: hostile.attack(target, content))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
