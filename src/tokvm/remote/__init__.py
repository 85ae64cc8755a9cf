"""How do we reach a program or a machine? One module runs processes; ssh and its pipelined SFTP reader."""
