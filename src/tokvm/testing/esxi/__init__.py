"""A played ESXi host: busybox, vim-cmd, esxcli and sftp behind a real sshd, VMDK files, and guests that write them."""
