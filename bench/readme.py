"""Puts the measured figures into README.md: `python -m bench.readme`.

What it is: bench/results/*.json as Markdown tables between the README's markers. What it is not:
a measurement. A test fails when the README differs from what this would write.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
GIB = 2**30
SIZES = ("peak_reserved", "peak_on_the_card", "context_bytes")


def machine_line(result: dict[str, Any]) -> str:
    """Where and how it was measured."""
    machine = result["machine"]
    return (
        f"`{result['command']}` on {machine['cores']} cores of {machine['processor']} "
        f"({machine['torch_cpu_capability']}), {machine['memory_gib']} GiB, "
        f"{machine['system']}, torch {machine['torch']}."
    )


def table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def quality(result: dict[str, Any]) -> str:
    """Perplexity, divergence and agreement of each recipe."""
    header = (
        "recipe",
        "bits per weight",
        "MiB",
        "perplexity",
        "KL divergence",
        "99 % KL",
        "same top token",
        "KL while answering",
    )
    rows: list[tuple[object, ...]] = [
        (
            row["recipe"],
            row["bits_per_weight"],
            row["mib"],
            f"{row['perplexity']:.3f}",
            f"{row['mean_kl']:.4f}",
            f"{row['p99_kl']:.3f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['mean_kl_decoding']:.4f}",
        )
        for row in result["rows"]
    ]
    reference = result["rows"][0]
    rows.insert(
        0, ("original, bf16", 16, "", f"{reference['reference_perplexity']:.3f}", 0, 0, "100 %", "")
    )
    return (
        f"{table(header, rows)}\n\nOn {result['text']} ({reference['tokens']:,} tokens), held out "
        "from training. Reading a prompt and answering add in different orders, hence the last "
        f"column (its first {result['decoded_rows']} answers). {machine_line(result)}"
    )


def memory(result: dict[str, Any]) -> str:
    """Peak memory of quantizing and of answering."""
    header = (
        "recipe",
        "checkpoint",
        "quantizing: memory held",
        "mapped files",
        "its certificate: memory held",
        "answering: memory held",
        "mapped files",
    )
    rows: list[tuple[object, ...]] = [
        (
            f"`{row['recipe']}`",
            f"{row['checkpoint_gib']} GiB",
            f"{row['quantize']['anonymous_and_shared_gib']} GiB",
            f"{row['quantize']['mapped_files_gib']} GiB",
            f"{row['certify']['anonymous_and_shared_gib']} GiB" if "certify" in row else "",
            f"{row['load_and_16_tokens']['anonymous_and_shared_gib']} GiB",
            f"{row['load_and_16_tokens']['mapped_files_gib']} GiB",
        )
        for row in result["rows"]
    ]
    return (
        f"{table(header, rows)}\n\nSource: {result['source']}, {result['source_gib']} GiB. Memory "
        "held is anonymous and shared pages at their peak; mapped file pages can be dropped at any "
        f"time. {machine_line(result)}"
    )


def memory_calibrated(result: dict[str, Any]) -> str:
    """Peak memory of the recipes that read a text, and what more of it takes."""
    header = ("recipe", "text", "measuring: memory held", "quantizing: memory held", "mapped files")
    rows: list[tuple[object, ...]] = [
        (
            f"`{row['recipe']}`",
            f"{row['calibration_tokens']:,} tokens",
            *(
                f"{row[part]['anonymous_and_shared_gib']} GiB" if part in row else ""
                for part in ("measure", "quantize")
            ),
            f"{max(row[p]['mapped_files_gib'] for p in ('measure', 'quantize') if p in row)} GiB",
        )
        for row in result["rows"]
    ]
    gptq = per_thousand_tokens(result, "int4-gptq", "quantize")
    fit = per_thousand_tokens(result, "fit", "measure")
    layer = 4000 * result["hidden_size"] / 2**30  # hidden states in 32 bits, of 1,000 tokens
    return (
        f"{table(header, rows)}\n\nSource: {result['source']}. Another 1,000 tokens of text take "
        f"{gptq:.2f} GiB with `int4-gptq`, for any number of layers, and {fit:.2f} GiB while `fit` "
        f"measures, of which {layer:.3f} GiB are kept for each layer: with the 14B's 40 layers it "
        f"is {fit + (40 - result['layers']) * layer:.2f} GiB by that. It reads 2,048 tokens at "
        f"most. "
        f"{machine_line(result)}"
    )


def per_thousand_tokens(result: dict[str, Any], recipe: str, part: str) -> float:
    """GiB that 1,000 more tokens of text take, from the shortest and the longest text."""
    rows = [row for row in result["rows"] if row["recipe"] == recipe and part in row]
    few, many = rows[0], rows[-1]
    held = (row[part]["anonymous_and_shared_gib"] for row in (many, few))
    more = float(next(held) - next(held))
    return 1000 * more / int(many["calibration_tokens"] - few["calibration_tokens"])


def speed(result: dict[str, Any]) -> str:
    """Rates of quantizing beside llama-quantize's."""
    peers = [row["name"] for row in result["rows"] if row["name"] not in result["ratios"]]
    header = ("", "seconds", "GB of source a second", "bits per weight")
    rows: list[tuple[object, ...]] = [
        (
            f"llama-quantize {row['name']}" if row["name"] in peers else f"`{row['name']}`",
            row["seconds"],
            f"{row['gb_per_second']:.2f}",
            row["bits_per_weight"],
            *(result["ratios"].get(row["name"], dict.fromkeys(peers, "")).values()),
        )
        for row in result["rows"]
    ]
    return (
        f"{table((*header, *(f'rate / {name}' for name in peers)), rows)}\n\n{result['layers']} "
        f"layers of the 14B's dimensions; {result['timed']}; {result['rounds']} rounds. Ours check "
        f"every value and hash source and result. {result['peer']}. {machine_line(result)}"
    )


def full(result: dict[str, Any]) -> str:
    """One whole 14B."""
    (row,) = result["rows"]
    found = row["quantize"]
    return (
        f"The whole 14B ({result['source']}, {result['source_gib']} GiB) to `{row['recipe']}`, "
        f"{row['checkpoint_gib']} GiB: {found['anonymous_and_shared_gib']} GiB of memory held at "
        f"most, without the certificate. {machine_line(result)}"
    )


def prefix_reuse(result: dict[str, Any]) -> str:
    """How much sooner a remembered conversation answers."""
    header = ("", "prompt", "read of it", "first token after", "read afresh", "times sooner")
    rows: list[tuple[object, ...]] = [
        (
            row["step"],
            f"{row['prompt_tokens']:,} tokens",
            f"{row['tokens_read']}",
            f"{row['seconds']:.2f} s",
            f"{row['seconds_afresh']:.1f} s",
            row["times_sooner"],
        )
        for row in result["rows"]
    ]
    return (
        f"{table(header, rows)}\n\n{result['layers']} layers of the 14B's dimensions in "
        f"`{result['recipe']}`, medians of {result['rounds']} rounds. {machine_line(result)}"
    )


def decode_speed(result: dict[str, Any]) -> str:
    """Rates of prompts and answers beside llama.cpp's, and what the formats cost."""
    return (
        f"{_rates(result)}\n\n{_conditions(result)} The last columns say how many times as fast as "
        "llama.cpp (a LLaMA of the same dimensions). `int4-64` and `int4-128` are int4 everywhere "
        "in groups of so many; `fit-3.9` is what `fit` chooses for the demo at 3.9 bits, matrix by "
        "matrix; the default `int4` has its head in 8 bits; `bnb-nf4` runs on bitsandbytes' own "
        "kernels. KL is what the same formats cost the demo (first table), by the data-free method "
        "/ by gptq (`fit` is gptq's); llama.cpp's Q4_0 has its head there in Q8_0. "
        f"{_large_pages(result)}Peer: {result['peer']}. {machine_line(result)}"
    )


def _large_pages(result: dict[str, Any]) -> str:
    """How the models lay in memory."""
    shares = [row["huge_pages"] for row in result["rows"] if row.get("huge_pages") is not None]
    if not shares:
        return ""
    return (
        f"All models were read anew before, so that {min(shares):.0%} of each and more lay in huge "
        "pages. "
    )


def decode_speed_more(result: dict[str, Any]) -> str:
    """The same of other sizes or instructions, in fewer words."""
    return f"{_rates(result)}\n\n{_conditions(result)} Peer: {result['peer']}."


def decode_memory(result: dict[str, Any]) -> str:
    """What answers of the whole model need."""
    (row,) = result["rows"]
    return (
        f"All {result['layers']} layers of the 14B's dimensions at {row['bits_per_weight']} bits a "
        f"weight, answering after {result['depth']:,} tokens of context: {row['held_gib']} GiB of "
        f"memory held, {row['resident_gib']} GiB with all that is mapped. {machine_line(result)}"
    )


# Rows of bench.quality that are quantized as those of bench.decode_speed: data-free, calibrated.
SAME_FORMAT = {
    "int4-64": ("int4 everywhere, refit", "int4 everywhere, gptq"),
    "int4-128": (
        "int4 in groups of 128 everywhere, refit",
        "int4 in groups of 128 everywhere, gptq",
    ),
    "fit-3.9": ("`fit`, 3.9 bits",),
    "int4": ("`int4`", "`int4-gptq`"),
    "int8": ("`int8`",),
    "bnb-nf4": ("`bnb-nf4`",),
    "llama.cpp Q4_0pure": ("llama.cpp Q4_0 --pure",),
    "llama.cpp Q4_0": ("llama.cpp Q4_0",),
    "llama.cpp Q8_0": ("llama.cpp Q8_0",),
}


def _divergences() -> dict[str, str]:
    """What each contestant's format costs the demo, by the name of its checkpoint."""
    rows = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))["rows"]
    found = {row["recipe"]: f"{row['mean_kl']:.4f}" for row in rows}
    return {name: " / ".join(found[row] for row in same) for name, same in SAME_FORMAT.items()}


def _rates(result: dict[str, Any]) -> str:
    peers = [row["name"] for row in result["rows"] if not row["ours"]]
    header = ["", "bits per weight", "KL", "prompt, tokens/s", "answer, tokens/s"]
    divergences = _divergences()
    kinds = ["prompt", "answer"]
    if result["depth"]:
        header.append(f"after {result['depth']:,} tokens")
        kinds.append("late")
    rows: list[tuple[object, ...]] = [
        (
            f"`{row['name']}`" if row["ours"] else row["name"],
            row["bits_per_weight"],
            divergences.get(row["name"], ""),
            f"{row['prompt']:.0f}",
            f"{row['answer']:.1f}",
            *([f"{row['late']:.1f}"] if result["depth"] else []),
            f"{100 * row['share_of_bandwidth']:.0f} %" if row["share_of_bandwidth"] else "",
            *(_ratio(result["ratios"].get(row["name"], {}).get(peer), kinds) for peer in peers),
        )
        for row in result["rows"]
    ]
    named = [f"{', '.join(kinds)} / {peer.removeprefix('llama.cpp ')}" for peer in peers]
    return table((*header, "of the bandwidth", *named), rows)


def _conditions(result: dict[str, Any]) -> str:
    compiled = result.get("instructions", "native")
    return (
        f"{result['layers']} layers of the 14B's dimensions, {result['prompt_tokens']} tokens of "
        f"prompt, {result['answer_tokens']} of answer"
        + ("" if compiled == "native" else f", both compiled for {compiled}")
        + f"; medians of {result['rounds']} rounds in turns, and of the ratios within a round."
    )


def kv_type(result: dict[str, Any]) -> str:
    """What a context in bytes costs."""
    return (
        "A context in bytes (`--kv-type q8_0`, 8.5 bits a value) costs the demo in 16 bits a "
        f"KL divergence of {result['mean_kl']:.5f} (99 %: {result['p99_kl']:.4f}) and keeps "
        f"{100 * result['top1_agreement']:.1f} % of the top tokens ({result['tokens']:,} tokens). "
        f"{machine_line(result)}"
    )


def gpu(result: dict[str, Any]) -> str:
    """Decoding on a card by context; beside it what else its run and the later ones found."""
    header = ("context", "tokens/s", "GB/s", "of the copy", "launched one by one, tokens/s")
    rows: list[tuple[object, ...]] = [
        (
            f"{row['context']:,}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['gb_per_second']:,.0f}",
            f"{row['percent_of_copy']:.0f} %",
            f"{1000 / row['plain_ms']:.0f}",
        )
        for row in result["decode int4"]["rows"]
    ]
    return f"{table(header, rows)}\n\n{_gpu_beside(result)}"


def _gpu_beside(result: dict[str, Any]) -> str:
    peers = {name: found["token_ms"] for name, found in result["peers"].items()}
    ours, capped, cores = peers["m1local int4"], result["capped"], result["tensor cores"]
    prompts, peak = [result[f"prompt {name}"] for name in ("int4", "bf16")], result["prompt int4"]
    sizes = {name: f"{peak[name] / GIB:.2f}" for name in SIZES}
    away = result["later"]["embedding in host memory"]["bytes"]
    after, many, of_levels = cores["decode int4"][0], cores["ten layers"], cores["decode nf4"][0]
    return (
        f"The 14B's dimensions, random weights, int4 in groups of 64, on one {result['card']} "
        f"(copies at {result['copy']['gb_per_second']:,.0f} GB/s), torch "
        f"{result['machine']['torch']}; `{result['command']}`. The matrices of a token alone: "
        f"{ours:.2f} ms; int8 {peers['m1local int8']:.2f}, NF4 {peers['m1local nf4']:.2f}; "
        f"bitsandbytes' NF4 {peers['bitsandbytes NF4']:.2f} "
        f"({peers['bitsandbytes NF4'] / ours:.2f} times ours in int4), torch's int4pack "
        f"{peers['int4pack']:.2f} ({peers['int4pack'] / ours:.2f}), bf16 by cuBLAS "
        f"{peers['bf16 cuBLAS']:.2f}. A prompt of 2,048 tokens: {prompts[0]['prompt_ms']:.0f} ms, "
        f"bf16 {prompts[1]['prompt_ms']:.0f}. With 8k of context torch reserved "
        f"{sizes['peak_reserved']} GiB ({peak['percent_of_plan'] - 100:.1f} % more than planned), "
        f"the process {sizes['peak_on_the_card']} with {sizes['context_bytes']} of CUDA's own; "
        f"the embedding, {away / GIB:.2f} of it, lies in the host's memory since. "
        f"Under 7.2 GiB: {capped[0]['gpu_layers']} layers on the card and 8k of context "
        f"{capped[0]['tokens_per_second']:.0f} tokens/s, {capped[1]['gpu_layers']} layers and 2k "
        f"in bytes {capped[1]['tokens_per_second']:.0f}. Changed since: prompts, "
        f"{result['later']['prompt int4']['prompt_ms']:.0f} ms; and decoding by tensor cores, "
        f"{after['graph_ms']:.2f} ms a token at {after['context']} "
        f"({1000 / after['graph_ms']:.0f} tokens/s, {after['percent_of_copy']:.0f} % of a copy at "
        f"{cores['copy']['gb_per_second']:,.0f} GB/s; NF4, with programs of 4 warps, "
        f"{of_levels['graph_ms']:.2f} ms), when all its kernels had programs of 8 warps. All but "
        f"o_proj's and down's have 4 now: for gate and up {many['4 warps']['gated_kernel']:.1f} µs "
        f"a layer and not {many['8 warps']['gated_kernel']:.1f}. Not measured: that together, and "
        f"prompts since what stands between their products is kernels too."
    )


def _ratio(found: dict[str, float] | None, kinds: Sequence[str]) -> str:
    return ", ".join(f"{found[kind]:.2f}" for kind in kinds) if found else ""


def render(text: str) -> str:
    """README text with every block filled from its results."""
    blocks = {
        "prefix_reuse": prefix_reuse,
        "quality": quality,
        "memory": memory,
        "memory_calibrated": memory_calibrated,
        "quantize_speed": speed,
        "memory_full": full,
        "decode_speed": decode_speed,
        "decode_speed_full": decode_speed_more,
        "decode_speed_late": decode_speed_more,
        "decode_speed_avx2": decode_speed_more,
        "decode_memory": decode_memory,
        "kv_type": kv_type,
        "gpu": gpu,
    }
    for name, block in blocks.items():
        path = RESULTS / f"{name}.json"
        filled = block(json.loads(path.read_text(encoding="utf-8")))
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{filled}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Rewrite README.md."""
    path = ROOT / "README.md"
    path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
