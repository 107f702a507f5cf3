"""
Use a trained model: continue prompts, score text, export.

    python sample.py                               # type prompts; takes the run that saved last
    python sample.py out/RUN "def main("           # continue one prompt
    python sample.py out/RUN --score FILE ...      # bits per byte of text
    python sample.py out/RUN --export DIR          # make a folder for Hugging Face's transformers

It uses the run's checkpoint with the lowest val_bpb. Results go to stdout, everything else to stderr.
Exit status: 0 success, 2 an error that the user can fix, 130 Ctrl-C.
"""

import argparse
import codecs
import contextlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import dataset
import machine
import report
from export.export import write_export
from model import GPT, GPTConfig


class SampleError(Exception):
    """User-fixable error. The message has two lines: what is wrong, and how to fix it."""

    exit_status = 2


# -----------------------------------------------------------------------------
# Arguments

NUMBERS = (  # flag, type, lowest, highest, default, help
    ("tokens", int, 1, 10**6, 200, "number of tokens to generate, at most"),
    ("temperature", float, 0, 100, 0.8, "0 takes the most likely token"),
    ("top-k", int, 0, 10**6, 50, "sample from the k most likely tokens; 0: from all"),
    ("top-p", float, 0, 1, 1.0, "sample from the fewest tokens with this total probability"),
    ("num-samples", int, 1, 1024, 1, "number of texts, generated in one batch"),
    ("seed", int, 0, 2**31, 0, "random seed of the generated text"),
)


def number(kind, low, high):
    """Return a function that parses a number of type `kind` in [low, high], for argparse."""

    def parse(text):
        if not low <= kind(text) <= high:  # also true for nan
            raise argparse.ArgumentTypeError(f"{text} is out of range, {low} to {high:,}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse prints it: "invalid int value"
    return parse


def usage_error(message):
    advice = "`python sample.py --help` lists the flags. A prompt that begins with a dash goes after `--`."
    raise SampleError(f"{message}.\n{advice}")


def parse_args():
    """Parse and check the command line."""
    usage = 'python sample.py [out/RUN] ["PROMPT"] [--NAME VALUE ...]'
    about = "Default run: the one that saved last. Without a prompt: reads prompts from stdin, one per line."
    parser = argparse.ArgumentParser(usage=usage, description=about, allow_abbrev=False)
    parser.error = usage_error
    parser.add_argument("run_and_prompt", nargs="*", metavar="", help=argparse.SUPPRESS)
    for name, kind, low, high, default, text in NUMBERS:
        options = {"type": number(kind, low, high), "default": default, "metavar": "N"}
        parser.add_argument(f"--{name}", help=f"{text} [{default}]", **options)
    text = "print the bits per byte of text files or folders, or of stdin (-)"
    parser.add_argument("--score", nargs="+", metavar="FILE", help=text)
    text = "score documents without cutting them; each token has max_seq_len - N tokens of context or more"
    parser.add_argument("--stride", type=number(int, 1, 10**6), metavar="N", help=text)
    text = "make a folder for Hugging Face's transformers"
    text = "with --score: field or column with the text [of the run]"
    parser.add_argument("--text-field", metavar="NAME", help=text)
    text = "with --score: separates the documents in a file [of the run]"
    parser.add_argument("--document-separator", metavar="TEXT", help=text)
    parser.add_argument("--export", type=Path, metavar="DIR", help=text)
    parser.add_argument("--device-type", help="cuda, mps or cpu [the first one available]")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_intermixed_args(words[:end])
    args.run_and_prompt += words[end + 1 :]
    for name in ("stride", "text_field", "document_separator"):
        if getattr(args, name) is not None and args.score is None:
            usage_error(f"--{name.replace('_', '-')} needs --score")
    if len(args.run_and_prompt) > 2:
        extra = args.run_and_prompt[2]
        usage_error(f"{extra!r} is a third argument after run and prompt. Put the prompt into quotes")
    return args


# -----------------------------------------------------------------------------
# The run


def is_run(argument):
    """Whether a single argument is a run, not a prompt: a folder, or a wrong name in a folder of runs."""
    folder = os.path.dirname(argument.rstrip("/")).rstrip("/")  # of "// a comment": ""
    if os.path.isfile(os.path.join(argument, "config.json")):
        return True
    if os.path.isdir(argument):
        return argument.strip("./") != ""
    return os.path.isdir(folder) and any(Path(folder).glob("*/config.json"))


def find_run(run_and_prompt):
    """[RUN] [PROMPT] -> (run folder, by default that of the newest checkpoint; prompt or None)."""
    first, second = [*run_and_prompt, None, None][:2]
    if second is not None or (first and is_run(first)):
        return Path(first), second
    manifests = [*Path("out").glob("*/checkpoints/*/manifest.json")]
    newest = max(manifests, key=saved_at, default=None)
    if newest is None:
        raise SampleError("no run given, and no run in out/ has saved.\nTrain one with `python train.py`.")
    run = newest.parents[2]
    others = [manifest for manifest in manifests if manifest.parents[2] != run]
    if others:
        count = 1 + len({manifest.parents[2] for manifest in others})
        example = report.quoted(str(max(others, key=saved_at).parents[2]))
        line = f"{run} saved last, of {count} runs in out/. For another one: python sample.py {example}"
        print(report.escaped(line), file=sys.stderr)
    return run, first


def saved_at(manifest):
    """When a checkpoint was saved. If its run deletes it at this moment: when that run last changed one."""
    for path in (manifest, manifest.parents[1]):
        with contextlib.suppress(OSError):
            return os.path.getmtime(path)
    return 0.0  # somebody deletes the run


def load(run_folder, device, scoring):
    """The run's best checkpoint -> (GPT with fp32 weights on `device`, tokenizer, settings, state, about)."""
    if not os.path.isfile(run_folder / "config.json"):
        problem = f"{run_folder} is not a run: it has no config.json"
        problem = problem if os.path.isdir(run_folder) else f"there is no run {run_folder}"
        raise SampleError(f"{problem}.\nGive the folder of a run, such as out/NAME, before the prompt.")
    try:
        folder, weights, state, faults = checkpoint.load_best(run_folder / "checkpoints")
        if folder is None:
            problem = f"no valid checkpoint; {faults[0]}" if faults else "no checkpoint yet"
            advice = "continue this one with train.py --resume" if faults else "wait until this one saves"
            raise SampleError(f"{run_folder} has {problem}.\nGive another run, or {advice}.")
        config = json.loads((run_folder / "config.json").read_text())
        settings, evaluated = config["settings"], state.get("val_step", state["step"])
        tokenizer = dataset.load_tokenizer(run_folder / "tokenizer")
        # generation on a CPU multiplies one row at a time: fp32 is as fast as bf16 there
        is_fast = machine.find_dtype(device) == getattr(torch, settings["dtype"])
        use_saved = is_fast and (scoring or device.type != "cpu")
        dtype = settings["dtype"] if use_saved else "float32"
        with torch.device("meta"):
            model = GPT(GPTConfig(**config["model"]), machine.find_dtype(device, dtype))
        model.init_weights(device, seed=0)
        model.load_state_dict(weights)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        if machine.is_out_of_memory(error):
            raise
        problem = f"{run_folder} is damaged: {type(error).__name__}: {str(error).splitlines()[0]}"
        raise SampleError(f"{problem}.\nRestore its files from a copy.") from None
    about = f"{folder}, {state['val_bpb']:.4f} bits per byte"
    about += f" at step {evaluated}" if evaluated != state["step"] else ""  # saved after that evaluation
    about += f" · depth {model.config.n_layer} · {device.type} · {dtype}"
    return model, tokenizer, settings, state, about + "".join(f" · skipped: {fault}" for fault in faults)


# -----------------------------------------------------------------------------
# Continue prompts


def show(text, end=""):
    """Print to stdout: on a terminal escaped, into a file or pipe as it is."""
    print(report.escaped(text) if sys.stdout.isatty() else text, end=end, flush=True)


def letters(chunks):
    """
    A stream of UTF-8 bytes -> a stream of strings. The bytes of an incomplete character are kept back until
    it is complete, and left out at the end: the last token may be half a character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for chunk in chunks:
        yield decoder.decode(chunk)


def generate_bytes(model, tokenizer, ids, args, seed):
    """Yield for each new token a list: its bytes in each sample, or b"" after the bos that ends a sample."""
    bos, ended = tokenizer.n_vocab - 1, set()
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": seed}
    for new in model.generate([ids] * args.num_samples, bos, args.tokens, **sampling):
        ended |= {n for n, token in enumerate(new) if token == bos}
        if len(ended) == len(new):
            return
        yield [b"" if n in ended else tokenizer.decode_single_token_bytes(t) for n, t in enumerate(new)]


def write(model, tokenizer, prompt, args, seed):
    """Print the prompt and its continuation while it is generated, then the other samples of the batch."""
    prompt = os.fsencode(prompt).decode("utf-8", "replace")
    ids = [tokenizer.n_vocab - 1]
    if prompt:  # cut like training text: a tokenizer fails on a million blanks
        ids = dataset.encode_held_out(tokenizer, [prompt], whole=True).tolist()
    if len(ids) > model.config.max_seq_len:
        print(f"the prompt has {len(ids):,} tokens: only its end is used", file=sys.stderr)
    show(prompt)
    pieces = []  # for each new token the bytes of all samples

    def first_sample():
        for new in generate_bytes(model, tokenizer, ids, args, seed):
            pieces.append(new)
            yield new[0]

    for text in letters(first_sample()):
        show(text)
    for n in range(1, args.num_samples):
        show(f"\n--- {n + 1}\n{prompt}" + "".join(letters(new[n] for new in pieces)))
    show("\n")


def talk(model, tokenizer, args):
    """Continue each line of stdin, each with a new seed, until stdin ends; on a terminal ask for lines."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history
    interactive, seed = sys.stdin.isatty(), args.seed
    sys.stdin.reconfigure(errors="replace")
    with contextlib.suppress(EOFError):
        while True:
            prompt = input("> " if interactive else "")
            try:
                write(model, tokenizer, prompt, args, seed)
            except KeyboardInterrupt:  # stops this text; Ctrl-C at the prompt ends the program
                if not interactive:
                    raise
                print()
            seed += 1
    if interactive:
        print()


# -----------------------------------------------------------------------------
# Score text


def reading_options(args, settings):
    """How to find the documents in a file: as the run did, unless the flags say something else."""
    names = {"text_field": "text_field", "separator": "document_separator"}
    options = {key: getattr(args, name) or settings.get(name) for key, name in names.items()}
    return {key: None if value == "auto" else value for key, value in options.items()}


def read_texts(name, reading):
    """The documents in a file or folder, or for "-" in stdin, which is read like a .txt file."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "stdin.txt") if name == "-" else name
            if name == "-":
                path.write_bytes(sys.stdin.buffer.read() if sys.stdin else b"")
            texts = list(dataset.read_documents(path, **reading))
    except OSError as error:
        advice = "Check the path and its permissions."
        raise SampleError(f"{name} cannot be read: {error.strerror}.\n{advice}") from None
    if not texts:
        raise SampleError(f"{name}: there is no text in it.\nGive a file or a folder of text.")
    return texts


def scoring_batches(tokens, token_bytes, T, stride, batch_size=8):
    """
    Cut a text into rows of T tokens, each starting `stride` tokens after the one before, and yield batches
    (tokens, targets, bytes) for report.bits_per_byte. tokens: 1-D int64, starting with bos; token_bytes:
    int64 (n_vocab,). Each token is a target once, in the first row that contains it, so that every token has
    at least T - stride tokens of context (or all there are). Bos and padding are never targets.
    """
    bos, count = tokens[0].item(), 1 + max(0, math.ceil((len(tokens) - T) / stride))
    rows = F.pad(tokens, (0, T + (count - 1) * stride - len(tokens)), value=bos).unfold(0, T, stride)
    for start in range(0, count, batch_size):
        targets = rows[start : start + batch_size].clone()  # (B, T)
        inputs = F.pad(targets[:, :-1], (1, 0), value=bos)
        targets[int(start == 0) :, : T - stride] = bos  # in the very first row all tokens are targets
        lengths = token_bytes[targets]
        yield inputs, targets.masked_fill(lengths == 0, -1), int(lengths.sum())


def score(model, tokenizer, token_bytes, texts, stride):
    """Score documents -> (summed loss in nats, number of tokens, number of bytes)."""
    tokens = dataset.encode_held_out(tokenizer, texts, whole=stride is not None)
    tokens = torch.from_numpy(tokens.astype("int64")).to(token_bytes.device)
    T, lengths = model.config.max_seq_len, token_bytes[tokens]
    batches = scoring_batches(tokens, token_bytes, T, min(T, stride or T))
    with torch.set_grad_enabled(tokens.is_mps):  # on MPS, attention without gradients leaks later tokens
        bpb = report.bits_per_byte(model, batches, tokens.device)
    count = int(lengths.sum())
    return bpb * math.log(2) * count, int((lengths > 0).sum()), count


def print_score(name, loss_sum, tokens, bytes_):
    bpb, perplexity = loss_sum / (math.log(2) * bytes_), math.exp(loss_sum / tokens)
    details = f"perplexity {perplexity:.2f} per token, {tokens:,} tokens, {bytes_:,} bytes"
    show(f"{bpb:.6f} bits per byte, {details}  {name}", end="\n")


def score_files(model, tokenizer, names, reading, stride, device):
    """Print the score of each file, of each document in a .jsonl, and of several files together."""
    token_bytes = torch.from_numpy(dataset.token_bytes(tokenizer).astype("int64")).to(device)
    all_scores = []
    for name in names:
        texts, scores = read_texts(name, reading), []
        if name.endswith(".jsonl"):
            for n, text in enumerate(texts, 1):
                scores.append(score(model, tokenizer, token_bytes, [text], stride))
                print_score(f"{name}:{n}", *scores[-1])
        else:
            scores.append(score(model, tokenizer, token_bytes, texts, stride))
        print_score(name, *map(sum, zip(*scores)))
        all_scores += scores
    if len(names) > 1:
        print_score("together", *map(sum, zip(*all_scores)))


# -----------------------------------------------------------------------------
# Export


def without_folders(config):
    """
    The content of a run's config.json, with only the last part of each path, for other people to read: the
    data and the run given as --init-from, in the settings and in the command. Names of public data stay.
    """
    settings, command = dict(config["settings"]), config["command"]
    for name in ("data", "init_from"):
        value = settings.get(name)
        if value and not dataset.is_public(value):
            settings[name] = Path(value).name or config["corpus"]["name"]
            old, new = (f"--{name.replace('_', '-')} {report.quoted(v)}" for v in (value, settings[name]))
            command = command.replace(old, new)
    return {**config, "settings": settings, "command": command}


def training_facts(run, state):
    """Lines of the model card: the text, how much of it was read, val_bpb of this checkpoint, time."""
    corpus, settings, numbers = run.config["corpus"], run.config["settings"], run.numbers | state
    size, tokens = corpus.get("train", {}).get("tokens"), numbers.get("tokens")
    of = f", {report.short(size)} training tokens" if size else ""
    lines = [f"Text: `{settings['data']}`, fingerprint {corpus.get('fingerprint')}{of}"]
    if tokens is not None:
        epochs = f", {tokens / size:.3g} epochs" if size else ""
        lines.append(f"Trained on {report.short(tokens)} tokens{epochs}, to step {state['step']}")
    part = min(settings.get("eval_bytes") or math.inf, corpus.get("val", {}).get("bytes", math.inf))
    part = f"{part:,} bytes of held-out text" if part < math.inf else "held-out text"
    lines.append(f"val_bpb: **{state['val_bpb']:.4f}** bits per byte, on {part} of the same corpus")
    seconds = numbers.get("wall_time", numbers.get("total_training_time", 0))
    lines.append(f"Time: {report.duration(seconds)} on {run.config['world_size']} × {run.config['device']}")
    return "".join(f"\n- {line}" for line in lines)


def export(folder, model, tokenizer, run_folder, state):
    """Make the folder of an export; the figures and curves of its model card come from the run's report."""
    run = report.Run(run_folder)
    run.config = without_folders(run.config)
    depth, num_params = run.config["settings"]["depth"], sum(run.config["num_params"].values())
    about = f"A GPT of depth {depth}, {num_params:,} parameters"
    about += f", trained on `{run.config['settings']['data']}` by onedial.\n{training_facts(run, state)}"

    def figures(folder):
        """Draw the curves into `folder` -> the sections of the model card about the training."""
        groups = [report.Group([run])]
        parts = ["## Figures", report.results(groups), report.curves(groups, folder, report.Console())]
        return "\n\n".join([*parts, "## How it was trained", report.how_to_reproduce(run)])

    tokenizer_file = run_folder / "tokenizer" / "tokenizer.tiktoken"
    return write_export(folder, model, tokenizer, tokenizer_file, run.name, about, figures)


# -----------------------------------------------------------------------------
# The script


def explain(error):
    """Print the two lines of a user-fixable error -> exit status. Raise any other error again."""
    if isinstance(error, OSError):  # the output cannot be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout when it exits
        if isinstance(error, BrokenPipeError):  # its reader has stopped, as in `| head`: no error
            return 0
        advice = "Free disk space" if checkpoint.is_full(error) else "Check the path and its permissions"
        message = f"{error.filename or 'the output'} cannot be written: {error.strerror}.\n{advice}."
    elif isinstance(error, (RuntimeError, MemoryError)) and machine.is_out_of_memory(error):
        message = "the device has too little memory.\nUse fewer --num-samples."
    elif hasattr(error, "exit_status"):
        message = str(error)
    else:
        raise
    print(f"error: {report.escaped(message)}", file=sys.stderr)
    return getattr(error, "exit_status", 2)


if __name__ == "__main__":
    report.open_console()
    try:
        args = parse_args()
        run_folder, prompt = find_run(args.run_and_prompt)
        device = machine.find_device(args.device_type)
        model, tokenizer, settings, state, about = load(run_folder, device, scoring=args.score is not None)
        print(report.escaped(about), file=sys.stderr, flush=True)
        if args.export is not None:
            print(export(args.export, model, tokenizer, run_folder, state))
            sys.exit()
        model.to(model.compute_dtype)  # cast the weights once, not in each layer for each token
        if args.score is not None:
            score_files(model, tokenizer, args.score, reading_options(args, settings), args.stride, device)
        elif prompt is not None:
            write(model, tokenizer, prompt, args, args.seed)
        elif sys.stdin is not None:
            talk(model, tokenizer, args)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except Exception as error:
        sys.exit(explain(error))
