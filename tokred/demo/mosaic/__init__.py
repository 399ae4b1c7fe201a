"""A small vision-language model on mosaics of handwritten digits: questions in words, answers of one word."""
