"""A product-key layer against lucidrains' product-key-memory.

python -m benchmarks.product_key --device {cpu,cuda}
"""
