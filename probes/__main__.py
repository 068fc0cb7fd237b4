from cli.main import probes

probes()
