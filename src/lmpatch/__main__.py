"""``python -m lmpatch``, and ``accelerate launch -m lmpatch`` for several processes."""

from .cli import main

main()
