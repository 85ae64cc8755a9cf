from tokvm.cli.main import main

main()
