"""Twenty stories from twenty fixed prompts, one try each, none left out: plots/stories.md.

    python tests/twenty_stories.py [checkpoint]

With each story stands the longest run of tokens that it shares, word for word, with the training
text (where the TinyStories sample is at hand, see conftest.py). At the end the figures of the
whole validation split.
"""

import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ROOT, SAMPLE, load_notebook

PROMPTS = """
Once upon a time, there was a little girl who
Tom had a big red balloon.
One day, a small mouse found
Lily and her mom went to the park.
The sun was hot, and the dog
Ben did not want to share his toys.
"Can you help me?" asked the bird.
There was a loud noise in the kitchen.
Mia was sad because
The old tree in the garden
Sam and Anna built a tower of blocks.
It was raining, so
The cat saw a fish in the pond.
Grandma baked a cake for
Max was scared of the dark.
Once there was a brave little car
The princess lost her ring.
"Look, a rainbow!" said
Two friends wanted to climb
At night, when everybody slept,
""".strip().splitlines()


def main(path: Path):
    nb = load_notebook()
    nb.torch.set_num_threads(os.cpu_count())
    model, tokenizer, info = nb.load_model(path)
    size = sum(p.numel() for p in model.parameters())
    lines = ["# Twenty stories, unselected", ""]
    lines += [
        f"Written by `{path.name}` ({size / 1e6:.1f} M parameters) with temperature 0.8, top-p "
    ]
    lines[-1] += "0.95 and the number of the story as its seed. In bold what it was given."
    lines += [
        "",
        "| | story | longest run of its words found in the training text |",
        "| --- | --- | --- |",
    ]
    stream = None
    if SAMPLE:
        source = nb.file_source(SAMPLE)
        stream = nb.encode_stories([s for b in source.batches("train") for s in b], tokenizer)
    longest = []
    for number, prompt in enumerate(PROMPTS, 1):
        pieces = list(nb.stream_text(model, tokenizer, prompt, 300, seed=number))
        ended = pieces[-1] == nb.EOT
        text = "".join(pieces).removesuffix(nb.EOT).strip("\n").replace("\n", "<br>")
        ending = "" if ended else " *(stopped at 300 tokens)*"
        copied = "?"
        if stream is not None:
            ids = tokenizer.encode_ordinary(text.replace("<br>", "\n"))
            longest.append(nb.longest_copied(ids, stream)[0])
            copied = f"{longest[-1]} of {len(ids)} tokens"
        lines.append(f"| {number} | **{prompt}**{text}{ending} | {copied} |")
    if longest:
        lines += [
            "",
            f"Longest run, median of the twenty: {statistics.median(longest):.0f} tokens.",
        ]
    (ROOT / "plots" / "stories.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if SAMPLE:
        held_out = [s for b in source.batches("validation") for s in b]
        figure = nb.bits_per_byte(model, tokenizer, held_out)
        print(
            f"{path.name}: {figure:.4f} bits per byte on all {len(held_out):,} validation stories"
        )
    print(f"metrics in the file: {info['metrics']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "best_model_params.pt")
