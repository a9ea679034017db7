"""How is an audit shown and kept?  Terminal, files, JUnit and stand-alone scripts; nothing here judges."""
