"""How much of anything a file from outside may ask for; what asks for more is damaged, or means harm.

Published files are far below. docs/reliability.md says how the limits are tried.
"""

TEXT_BYTES = 64 << 20  # of a file that is read whole; the largest, a tokenizer.json, has some 30 MiB
YAML_VALUES = 100_000  # aliases written out; the shipped files have some 2,000
MODEL_SIZE = 1 << 24  # of a vocabulary, a hidden state, a context
MODEL_LAYERS = 1024
GGUF_ITEMS = 1 << 20  # of an array in the metadata; the largest, of merges, has some 500,000
TOKEN_CHARACTERS = 1024  # of a special token's name
TOKENIZER_GROWTH = 256  # times that a text may become longer, by what tokenizer.json replaces in it
TEMPLATE_SECONDS = 5  # for one conversation
TEMPLATE_BYTES = 1 << 30  # of memory
TEMPLATE_CHARACTERS = 1 << 24  # that it writes
