"""The model card of a published checkpoint: README.md on the hub.

What it is: a text made of what the manifest and config.json say, and of nothing else; what the
licence of the Baichuan-M1 weights asks of a published derivative is in it. What it is not: part of
the checkpoint, whose manifest lists all its files, and not legal advice.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Self

from m1local import home
from m1local.checkpoint import CONFIG, parameter_shapes
from m1local.config import M1Config
from m1local.folder import read_json_object
from m1local.formats import LinearSpec
from m1local.generation_config import GenerationConfig
from m1local.manifest import CheckpointManifest

NAME = "README.md"
INSIDE = "Baichuan Inside"
CONTACT = "opensource.contact@baichuan-inc.com"
# Where the maker keeps the agreement; the model cards of its models link to this file.
AGREEMENT = (
    "https://github.com/baichuan-inc/Baichuan-M1-14B/blob/main/"
    "Baichuan-M1-14B%E6%A8%A1%E5%9E%8B%E7%A4%BE%E5%8C%BA%E8%AE%B8%E5%8F%AF%E5%8D%8F%E8%AE%AE.pdf"
)
MAKER = "baichuan-inc"
MODELS = ("Baichuan-M1-14B-Base", "Baichuan-M1-14B-Instruct")
# vocab_size, hidden_size, num_hidden_layers: whatever its folder is called, it is one of them.
DIMENSIONS = (133120, 5120, 40)


class Origin(Enum):
    """Whose model the source is, as far as that is known."""

    BAICHUAN = auto()
    DEMO = auto()
    OTHER = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a card is made of."""

    repository: str
    manifest: CheckpointManifest
    config: M1Config
    origin: Origin
    is_chat: bool

    @classmethod
    def of(cls, folder: Path, repository: str) -> Self:
        """The facts of the checkpoint in `folder`; raises CheckpointError for a bad one."""
        manifest = CheckpointManifest.read(folder)
        config = M1Config.from_file(folder / CONFIG)
        return cls(
            repository=repository,
            manifest=manifest,
            config=config,
            origin=_origin(manifest, config),
            is_chat=GenerationConfig.from_folder(folder).is_chat,
        )


def format_shares(
    manifest: CheckpointManifest, config: M1Config
) -> list[tuple[LinearSpec, int, float]]:
    """By format: how many matrices have it, and which share of their weights; the most first."""
    shapes = parameter_shapes(config)
    weights: Counter[LinearSpec] = Counter()
    matrices: Counter[LinearSpec] = Counter()
    for name, spec in manifest.linears.items():
        rows, columns = shapes[f"{name}.weight"]
        weights[spec] += rows * columns
        matrices[spec] += 1
    return [(spec, matrices[spec], n / weights.total()) for spec, n in weights.most_common()]


def card(facts: Facts) -> str:
    """The whole card."""
    parts = (
        _front_matter(facts), _title(facts), _use(facts), _formats(facts), _quality(facts),
        _changes(facts), _licence(facts),
    )  # fmt: skip
    return "\n\n".join(parts) + "\n"


def licence_facts(origin: Origin) -> str:
    """What whoever publishes must know, in a few sentences."""
    if origin is Origin.BAICHUAN:
        return (
            'The weights remain under the "Baichuan-M1-14B community licence agreement" '
            "(Baichuan-M1-14B 模型社区许可协议): no commercial use without the written permission "
            f"of Baichuan Intelligence ({CONTACT}). Whoever passes them on states their source, "
            "adds a copy of the agreement and keeps NOTICE; who publishes a derivative says "
            f'"{INSIDE}", and does not use the maker\'s name or logo as a brand.'
        )
    if origin is Origin.DEMO:
        return (
            "The weights of m1-tiny are under Apache-2.0. It was trained on MedQuAD "
            "(abachaa/MedQuAD) and five OpenStax books (Anatomy & Physiology 2e, Microbiology, "
            "Nutrition, Pharmacology, Population Health; openstax.org), changed, which remain "
            "under CC BY 4.0."
        )
    return (
        "The weights remain under the licence of their source, which m1local does not know. If "
        "that goes back to a Baichuan-M1 model, it is a community licence: no commercial use "
        f"without written permission ({CONTACT}), a copy of the agreement goes along, and a "
        f'published derivative says "{INSIDE}".'
    )


def _origin(manifest: CheckpointManifest, config: M1Config) -> Origin:
    dimensions = (config.vocab_size, config.hidden_size, config.num_hidden_layers)
    if "baichuan" in manifest.source.casefold() or dimensions == DIMENSIONS:
        return Origin.BAICHUAN
    files = read_json_object(home.DEMO / "manifest.json")["files"]
    demo = {record["sha256"] for name, record in files.items() if name.endswith(".safetensors")}
    source = {record.sha256 for record in manifest.source_files.values()}
    return Origin.DEMO if source == demo else Origin.OTHER


def _base_model(facts: Facts) -> str | None:
    """The source's repository, where it is known."""
    source = facts.manifest.source
    if source.count("/") == 1:
        return source
    return f"{MAKER}/{source}" if source in MODELS else None


def _front_matter(facts: Facts) -> str:
    base = _base_model(facts)
    fields: dict[str, object] = {"license": "other"}
    if facts.origin is Origin.BAICHUAN:
        fields |= {"license_name": "baichuan-m1-14b-community-license", "license_link": AGREEMENT}
    elif facts.origin is Origin.DEMO:
        fields["license"] = "apache-2.0"
    else:
        fields["license_name"] = "that-of-the-source"
    if base is not None:
        fields |= {"base_model": base, "base_model_relation": "quantized"}
    fields["language"] = ["en"] if facts.origin is Origin.DEMO else ["en", "zh"]
    fields |= {"library_name": "m1local", "pipeline_tag": "text-generation"}
    fields["tags"] = ["m1local", "baichuan_m1", "medical", "quantized", facts.manifest.recipe]
    # JSON's texts and lists are YAML's too, whatever a folder or a recipe is called.
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(("---", *lines, "---"))


def _title(facts: Facts) -> str:
    manifest = facts.manifest
    name = facts.repository.partition("/")[2]
    inside = f" · {INSIDE}" if facts.origin is Origin.BAICHUAN else ""
    at = f" at commit {_code(manifest.source_revision)}" if manifest.source_revision else ""
    made = (
        f"{_code(manifest.source)}{at}, **modified**: quantized by m1local "
        f"{manifest.m1local_version} with the recipe {_code(manifest.recipe)}, to be run on one's "
        "own machine."
    )
    demo = (
        " The source is the built-in demo of m1local, trained by that project, of the architecture "
        "of Baichuan-M1 but none of its weights."
    )
    warning = (
        "**Not a doctor.** Answers of a language model are often wrong and no medical advice; what "
        "concerns anybody's health is for a physician to decide."
    )
    told = made + demo if facts.origin is Origin.DEMO else made
    return f"# {name}{inside}\n\n{told}\n\n{warning}"


def _use(facts: Facts) -> str:
    kind = "It is chatted with." if facts.is_chat else "It is a Base model: it continues a text."
    return (
        "## Running it\n\nWith m1local installed:\n\n"
        f"```\nm1 run {facts.repository}\n```\n\n"
        "This fetches the files, compares each with its SHA-256 in `m1local.json`, and starts. "
        f"{kind} "
        "Its files are m1local's; formats that begin with bnb are stored as bitsandbytes does it."
    )


def _formats(facts: Facts) -> str:
    manifest, config = facts.manifest, facts.config
    weights = sum(r.nbytes for n, r in manifest.files.items() if n.endswith(".safetensors"))
    parameters = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    rows = [
        f"| {_spec(spec)} | {matrices} | {share:.1%} |"
        for spec, matrices, share in format_shares(manifest, config)
    ]
    ends = [
        f"{said} {_spec(manifest.linears[name])}"
        for name, said in (("model.embed_tokens", "The embedding is"), ("lm_head", "the head"))
        if name in manifest.linears
    ]
    told = f"{', '.join(ends)}. " if ends else ""
    calibration = (
        f" Calibrated with the text of SHA-256 {_code(manifest.calibration)}."
        if manifest.calibration
        else ""
    )
    return (
        "## Recipe and formats\n\n"
        f"Recipe {_code(manifest.recipe)}, method {_code(manifest.method)}: {parameters:,} "
        f"parameters in {_size_text(weights)}, {8 * weights / parameters:.2f} bits per weight "
        f"(16 before). Context {config.max_position_embeddings:,} tokens.{calibration}\n\n"
        "| format | matrices | share of their weights |\n| --- | --- | --- |\n"
        + "\n".join(rows)
        + f"\n\n{told}Norms and convolution taps stay as they were."
    )


def _quality(facts: Facts) -> str:
    found = facts.manifest.certificate
    if found is None:
        return (
            "## Quality\n\nNot measured. With the original at hand: "
            "`m1 eval kld CHECKPOINT --source ORIGINAL`."
        )
    sha256 = found.get("text_sha256")
    exactly = f" (SHA-256 {_code(str(sha256))})" if sha256 else ""
    return (
        "## Certificate\n\n"
        f"Measured against the 16-bit original on {found['tokens']:,} tokens of "
        f"{_code(str(found['text']))}{exactly}:\n\n"
        "| | | what it means |\n| --- | --- | --- |\n"
        f"| perplexity of the original | {float(found['reference_perplexity']):.4g} | "
        "how surprised it is by each token of the text; 1 is not at all |\n"
        f"| perplexity of this | {float(found['perplexity']):.4g} | the nearer, the better |\n"
        f"| KL divergence, mean | {float(found['mean_kl']):.4f} | nats between the two "
        "distributions of the next token; 0 is the same |\n"
        f"| KL divergence, 99 % | {float(found['p99_kl']):.3f} | only one token in a hundred is "
        "worse |\n"
        f"| same top token | {float(found['top1_agreement']):.1%} | how often both find the same "
        "token the likeliest |\n\n"
        "Figures on one short text, not an exam: they say how far this is from the original, not "
        "how often either is right."
    )


def _changes(facts: Facts) -> str:
    return (
        "## Changes made to the original\n\n"
        "- The matrices were quantized to the formats above.\n"
        "- The rows of `lm_head` were normalized beforehand, which the original does when it runs "
        "(NormHead).\n"
        "- `config.json` names the quantization; the index lists the new files.\n"
        "- Tokenizer and generation defaults are as they were. No code of the original is here, "
        "and none is run.\n\n"
        "`NOTICE` says so beside the weights, and `m1local.json` has the SHA-256 of every file "
        "here and of the source's weights."
    )


def _licence(facts: Facts) -> str:
    link = f"\n\nThe agreement: {AGREEMENT}" if facts.origin is Origin.BAICHUAN else ""
    return f"## Licence\n\n{licence_facts(facts.origin)}{link}"


def _spec(spec: LinearSpec) -> str:
    group = "" if spec.group_size is None else f", groups of {spec.group_size}"
    return f"{_code(spec.format)}{group}"


def _code(text: str) -> str:
    """A name as code, in one line and without anything that Markdown would take for more."""
    return f"`{' '.join(text.replace('`', ' ').replace('|', ' ').split())}`"


def _size_text(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
