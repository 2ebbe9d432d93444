"""llama.cpp sampling in batches: tokens a second while decoding, and with the prompts' prefill.

Usage: llama_cpp_generate.py --model MODEL.gguf --data pairs.jsonl [--weights Q4_1|Q8_0|F16|BF16] [--prompts 16] ...

llama.cpp's own batch interface through llama-cpp-python: a prompt is decoded once, its cache shared by its samples, and
then every sequence's next token goes into one batch. Its own sampler at temperature 1, every sample to its full length.
The file's Q4_1 weights are used as they are, or rewritten once, beside the file, in another type.
"""

import argparse
import ctypes
import os
import pathlib
import time

import llama_cpp as ll
import peer

TYPES = {"Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0, "F16": ll.LLAMA_FTYPE_MOSTLY_F16, "BF16": ll.LLAMA_FTYPE_MOSTLY_BF16}


@ll.llama_log_callback
def silent(level: int, text: bytes, data: object) -> None:
    pass


def in_type(path: pathlib.Path, weights: str) -> pathlib.Path:
    """The model with its weights in that type."""
    if weights == "Q4_1":
        return path
    made = path.with_suffix(f".from-Q4_1.{weights}.gguf")
    if not made.exists():
        parameters = ll.llama_model_quantize_default_params()
        parameters.ftype = TYPES[weights]
        parameters.allow_requantize = True
        partial = made.with_suffix(".partial")
        if ll.llama_model_quantize(os.fsencode(path), os.fsencode(partial), ctypes.byref(parameters)) != 0:
            raise SystemExit(f"llama.cpp could not write {made}")
        partial.rename(made)
    return made


class Session:
    """A model, its context, one batch and a sampler for each sequence."""

    def __init__(self, path: pathlib.Path, sequences: int, cells: int, threads: int) -> None:
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(os.fsencode(path), ll.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not read {path}")
        parameters = ll.llama_context_default_params()
        parameters.n_ctx = cells
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        # Samples of one prompt share its cells.
        parameters.kv_unified = True
        self.context = ll.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise SystemExit("llama.cpp made no context")
        self.batch = ll.llama_batch_init(512, 0, 1)
        self.samplers = [self.sampler(seed) for seed in range(sequences)]

    @staticmethod
    def sampler(seed: int) -> ctypes.c_void_p:
        chain = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
        ll.llama_sampler_chain_add(chain, ll.llama_sampler_init_temp(1.0))
        ll.llama_sampler_chain_add(chain, ll.llama_sampler_init_dist(seed))
        return chain

    def tokens(self, text: str) -> list[int]:
        raw = text.encode()
        room = (ll.llama_token * (len(raw) + 8))()
        vocab = ll.llama_model_get_vocab(self.model)
        count = ll.llama_tokenize(vocab, raw, len(raw), room, len(room), False, False)
        return list(room[:count])

    def decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Entries are token id, position, sequence, and whether its logits are wanted."""
        for index, (token, position, sequence, wanted) in enumerate(entries):
            self.batch.token[index] = token
            self.batch.pos[index] = position
            self.batch.n_seq_id[index] = 1
            self.batch.seq_id[index][0] = sequence
            self.batch.logits[index] = wanted
        self.batch.n_tokens = len(entries)
        if (status := ll.llama_decode(self.context, self.batch)) != 0:
            raise SystemExit(f"llama_decode returned {status}")

    def generate(self, prompts: list[list[int]], samples: int, new_tokens: int) -> tuple[list[list[int]], float]:
        """The samples, and when the first token of all was there."""
        memory = ll.llama_get_memory(self.context)
        ll.llama_memory_clear(memory, True)
        made: list[list[int]] = []
        for index, prompt in enumerate(prompts):
            first = index * samples
            for start in range(0, len(prompt), 512):
                part = prompt[start : start + 512]
                last = len(prompt) - 1
                self.decode([(token, start + i, first, start + i == last) for i, token in enumerate(part)])
            for sequence in range(first, first + samples):
                made.append([ll.llama_sampler_sample(self.samplers[sequence], self.context, -1)])
                if sequence != first:
                    ll.llama_memory_seq_cp(memory, first, sequence, -1, -1)
        prefilled = time.perf_counter()
        for step in range(1, new_tokens):
            self.decode([(ids[-1], len(prompts[i // samples]) + step - 1, i, True) for i, ids in enumerate(made)])
            for sequence, ids in enumerate(made):
                ids.append(ll.llama_sampler_sample(self.samplers[sequence], self.context, sequence))
        return made, prefilled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="the .gguf file")
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--weights", choices=["Q4_1", *TYPES], default="BF16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    ll.llama_log_set(silent, ctypes.c_void_p(0))

    texts = [row["prompt"] for row in peer.read_rows(arguments.data)][: arguments.prompts]
    if len(texts) < arguments.prompts:
        raise SystemExit(f"{arguments.data} has {len(texts)} prompts, {arguments.prompts} are asked for")
    count = arguments.prompts * arguments.samples
    path = in_type(arguments.model, arguments.weights)
    # A token is a byte or more.
    cells = sum(len(text.encode()) for text in texts) + count * arguments.new_tokens
    session = Session(path, count, cells, arguments.threads)
    prompts = [session.tokens(text) for text in texts]
    session.generate(prompts, arguments.samples, 2)
    begun = time.perf_counter()
    made, prefilled = session.generate(prompts, arguments.samples, arguments.new_tokens)
    ended = time.perf_counter()
    tokens = sum(len(ids) for ids in made)
    settings = {
        "weights": arguments.weights, "prompts": arguments.prompts, "samples": arguments.samples,
        "new_tokens": arguments.new_tokens, "temperature": 1.0, "threads": arguments.threads,
    }  # fmt: skip
    peer.report(
        "generate", "llama.cpp", ("llama-cpp-python",), "sequences", count, tokens, ended - begun, settings,
        prefill_seconds=prefilled - begun, prompt_tokens=sum(map(len, prompts)),
        decoding_tokens_per_second=(tokens - count) / (ended - prefilled),
        system=ll.llama_print_system_info().decode(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
