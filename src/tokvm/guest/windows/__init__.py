"""What makes a Windows guest boot on virtio: certificates, driver trees, the hive micro-morph, the first boot's work."""
