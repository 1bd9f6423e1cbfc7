//! Guest side of picovm: root file system images (EROFS) and the initramfs.
