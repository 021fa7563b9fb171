"""`python -m tavq` is `tavq`, for launchers such as: torchrun --nproc-per-node 2 -m tavq train generator"""

from .cli import main

if __name__ == "__main__":
    main()
