"""Train samples/tiny-gemma, a Gemma of 3 million parameters, on the text that ships with Python.

    python -m samples.train_tiny_gemma --output my-gemma --steps 300

Run it in the repository's root. The model learns through `GemmaForCausalLM` with a plain PyTorch
loop; the result is a checkpoint folder in Hugging Face layout.
"""

import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from gemma_deploy.config import GemmaConfig
from gemma_deploy.model.heads import GemmaForCausalLM
from samples.tiny_gemma_documents import read_documents
from samples.tiny_gemma_tokenizer import CONTROL_TOKENS, train_tokenizer

CONTEXT_TOKENS = 512
BATCH_ROWS = 4
DEFAULT_STEPS = 1300
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.3
EVALUATION_INTERVAL_STEPS = 50
# In held_out.txt; inside a document there is never more than one empty line.
DOCUMENT_SEPARATOR = "\n\n\n"


@click.command(context_settings={"show_default": True})
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent / "tiny-gemma",
    help="Folder for the checkpoint; files in it are overwritten.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=DEFAULT_STEPS,
    help=f"Optimizer steps of {BATCH_ROWS * CONTEXT_TOKENS} tokens each; 300 already give words.",
)
@click.option("--seed", default=0, help="Decides the first weights and the order of the text.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=2,
    help="CPU threads. Another number rounds differently, and so ends in another model.",
)
@click.option("--vocab-size", type=click.IntRange(min=300), default=2048, help="Tokens to learn.")
@click.option(
    "--max-documents",
    type=click.IntRange(min=1),
    help="Read no more documents than this: a quick try.  [default: all]",
)
@click.option(
    "--continue-from",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Start from the weights of a checkpoint this program wrote, instead of random ones.",
)
def main(
    *,
    output: Path,
    steps: int,
    seed: int,
    threads: int,
    vocab_size: int,
    max_documents: int | None,
    continue_from: Path | None,
) -> None:
    """Train a small Gemma on the documentation that ships with Python.

    The text is what this Python holds: its documentation topics, and the docstrings and comments of
    its standard library. One document in twenty is held out and written to held_out.txt.
    The README.md of samples/tiny-gemma tells how it was made with this program, and the numbers.
    """
    started = time.monotonic()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    documents = list(itertools.islice(read_documents(), max_documents))
    held_out = [document.text for document in documents if document.is_held_out]
    training = [document.text for document in documents if not document.is_held_out]
    tokenizer = train_tokenizer(training, vocab_size)
    held_out_ids, training_ids = encode(tokenizer, held_out), encode(tokenizer, training)
    held_out_rows = rows_of(list(itertools.chain.from_iterable(held_out_ids)))
    num_tokens = sum(map(len, training_ids))
    if len(held_out_rows) == 0 or num_tokens < 2 * CONTEXT_TOKENS:
        raise click.UsageError(
            f"{len(documents)} documents are too few: they must fill a row of {CONTEXT_TOKENS} tokens "
            "to train on and one to hold out. Give a larger --max-documents"
        )
    model = new_model(vocab_size)
    if continue_from is not None:
        earlier = GemmaForCausalLM.from_pretrained(continue_from, dtype=torch.float32)
        model.load_state_dict(earlier.state_dict())
    num_parameters = sum(p.numel() for p in model.parameters())
    click.echo(f"{num_parameters:,} parameters, {num_tokens:,} training tokens", err=True)

    training_loss = train(model, training_ids, held_out_rows, seed, steps)
    model.to(torch.bfloat16)
    save(output, model, tokenizer, held_out)
    # What was saved is measured, not what it was rounded from.
    held_out_loss = mean_loss(model.float(), held_out_rows)
    bytes_per_token = sum(len(t.encode()) for t in held_out) / sum(map(len, held_out_ids))
    click.echo(
        f"{output}: training loss {training_loss:.4f}, held-out loss {held_out_loss:.4f} nats/token "
        f"({held_out_loss / math.log(2) / bytes_per_token:.4f} bits/byte), "
        f"{time.monotonic() - started:.0f} s"
    )


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text between <bos> and <eos>."""
    eos = CONTROL_TOKENS.index("<eos>")
    return [[*encoding.ids, eos] for encoding in tokenizer.encode_batch(texts)]


def new_model(vocab_size: int) -> GemmaForCausalLM:
    """Return a fresh Gemma 1; every matrix has an input width that blocks of 128 divide."""
    return GemmaForCausalLM(
        GemmaConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=CONTEXT_TOKENS,
            initializer_range=0.04,
        )
    )


def rows_of(token_ids: list[int]) -> torch.Tensor:
    """Cut a stream of tokens into rows, int64 [rows, CONTEXT_TOKENS]; what is left over is dropped."""
    num_rows = len(token_ids) // CONTEXT_TOKENS
    return torch.tensor(token_ids[: num_rows * CONTEXT_TOKENS]).view(num_rows, CONTEXT_TOKENS)


def endless_batches(documents: list[list[int]], seed: int) -> Iterator[torch.Tensor]:
    """Yield int64 [BATCH_ROWS, CONTEXT_TOKENS]: each epoch joins and cuts the documents anew."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        offset = int(torch.randint(CONTEXT_TOKENS, (), generator=generator))
        stream = [token for i in order for token in documents[i]]
        rows = rows_of(stream[offset:])
        rows = rows[torch.randperm(len(rows), generator=generator)]
        yield from torch.split(rows, BATCH_ROWS)


@torch.no_grad()
def mean_loss(model: GemmaForCausalLM, rows: torch.Tensor) -> float:
    """Return the mean loss in nats per predicted token of rows [rows, CONTEXT_TOKENS]."""
    total = sum(
        loss_of(model, batch).item() * len(batch) for batch in torch.split(rows, BATCH_ROWS)
    )
    return total / len(rows)


def loss_of(model: GemmaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Return the model's own next-token loss of a batch, int64 [rows, CONTEXT_TOKENS]."""
    loss = model(batch, labels=batch, use_cache=False).loss
    if not isinstance(loss, torch.Tensor):
        raise TypeError("the model returned no loss although labels were given")
    return loss


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: a short warmup, a plateau, and a linear decay to 0."""
    warmup, decay = min(1.0, (step + 1) / WARMUP_STEPS), (steps - step) / (DECAY_SHARE * steps)
    return PEAK_LEARNING_RATE * min(warmup, decay, 1.0)


def train(
    model: GemmaForCausalLM,
    documents: list[list[int]],
    held_out: torch.Tensor,
    seed: int,
    steps: int,
) -> float:
    """Train `model` in place and return its mean training loss over the last tenth of the steps."""
    optimizer = new_optimizer(model)
    recent: list[float] = []
    batches = endless_batches(documents, seed)
    with _progress() as progress:
        task = progress.add_task("training", total=steps, status="")
        for step, batch in enumerate(itertools.islice(batches, steps)):
            recent.append(train_step(model, optimizer, batch, learning_rate(step, steps)))
            recent = recent[-max(1, steps // 10) :]
            mean = sum(recent) / len(recent)
            progress.update(task, advance=1, status=f"loss {mean:.3f}")
            if (step + 1) % max(EVALUATION_INTERVAL_STEPS, steps // 10) == 0:
                progress.console.print(
                    f"step {step + 1}: training loss {mean:.4f}, "
                    f"held-out loss {mean_loss(model, held_out):.4f} nats/token"
                )
    return sum(recent) / len(recent)


def new_optimizer(model: GemmaForCausalLM) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices, none on norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train_step(
    model: GemmaForCausalLM, optimizer: torch.optim.AdamW, batch: torch.Tensor, rate: float
) -> float:
    """Take one step of gradient descent and return the batch's loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(model, batch)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward unannotated
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=Console(stderr=True),
    )


def save(folder: Path, model: GemmaForCausalLM, tokenizer: Tokenizer, held_out: list[str]) -> None:
    """Write the model (in the dtype it has), its tokenizer and the held-out text."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GemmaTokenizer",
            **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")},
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT_TOKENS,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {f"{name}_token_id": CONTROL_TOKENS.index(f"<{name}>") for name in ("pad", "eos", "bos")},
    )
    (folder / "held_out.txt").write_text(
        DOCUMENT_SEPARATOR.join(held_out), encoding="utf-8", newline="\n"
    )


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
