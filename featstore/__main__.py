from cli.main import featstore

featstore()
