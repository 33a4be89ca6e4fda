from bnrnn.cli import main

main()
