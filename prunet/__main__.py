from prunet.cli import main

main()
