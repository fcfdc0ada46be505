"""The five special symbols, with the same ids in every vocabulary."""

PAD, BOS, EOS, UNK, MASK = range(5)
NUM_SPECIAL = 5
NAMES = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
