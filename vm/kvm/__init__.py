"""The `kvm` machine: a virtual machine monitor of our own on `/dev/kvm`."""
