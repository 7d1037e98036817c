"""Stores of vectors and engines that search them."""
