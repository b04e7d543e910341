"""Smaller forms of an exported model, written a tensor at a time, and what they say to the evaluation rows.

`gguf_file.py` writes Q8_0 with the gguf package (the tokenizer is written by `trainers/tokenizer/gguf_vocabulary.py`),
`with_torchao.py` int8 and fp8.
`forms.py` knows the forms: what can be quantized, how it is written, how it is loaded again. Begin there.
"""
