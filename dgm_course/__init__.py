"""Deep Generative Models, part 2: the reference kernels. Import the module that you need; nothing loads here."""

__version__ = "0.1.0"
