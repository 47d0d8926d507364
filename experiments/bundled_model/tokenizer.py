"""Train the byte-level BPE tokenizer on the train split, and tokenize both splits with it.

    python experiments/bundled_model/tokenizer.py --work build/bundled_model

Writes `tokenizer/` (loads with AutoTokenizer), `train.bin` (uint16 tokens, documents shuffled, each after an
end-of-text token) and `heldout.json` (a list of tokens for each held-out document) to the work folder.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
END = "<|endoftext|>"
POSITIONS = 1024


def documents(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # One token per digit, so that the tokens of a number do not depend on which numbers the corpus repeats.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bundled_model"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    corpus = documents(args.work / "train.jsonl")
    random.Random(args.seed).shuffle(corpus)
    tokenizer = train([d["text"] for d in corpus])
    folder = args.work / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written here, because save_pretrained names a class that only one major version of transformers knows.
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=END, eos_token=END,
                    model_max_length=POSITIONS, clean_up_tokenization_spaces=False)  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch([d["text"] for d in corpus])
    stream = np.concatenate([np.array([end, *e.ids], dtype=np.uint16) for e in encoded])
    stream.tofile(args.work / "train.bin")

    heldout = [
        dict(source=d["source"], bytes=len(d["text"].encode()), ids=[end, *tokenizer.encode(d["text"]).ids])
        for d in documents(args.work / "heldout.jsonl")
    ]
    (args.work / "heldout.json").write_text(json.dumps(heldout))
    characters = sum(len(d["text"]) for d in corpus)
    print(f"train: {len(stream):,} tokens, {characters / len(stream):.2f} characters a token")
    print(f"held out: {sum(len(d['ids']) for d in heldout):,} tokens in {len(heldout)} documents")


if __name__ == "__main__":
    main()
