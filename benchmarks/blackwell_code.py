"""What the matrix kernels for Blackwell are made of, read off their machine code: no card is at hand, so no times.

usage: python benchmarks/blackwell_code.py [--arch sm_103a] [--model flash] [--op experts_mx] [--rows FILE]

One line a kernel and config: matrix instructions of its main loop and all instructions there for each of them, copies
by tensor map and into tensor memory, registers, shared memory, columns of tensor memory, bytes spilled. With roles
(warp specialisation) each has a loop of its own; what is counted is the loop that holds the matrix instructions.
"""
