// Packs a linked Linux kernel into the smallest ELF file that loads to the same memory.
//
//   pack-elf VMLINUX OUTPUT
//
// The kernel's linker script aligns text, entry text and constants to 2 MiB, so that they can be
// mapped with large pages, and the linker fills the gaps: several MiB of int3 and zero bytes in the
// file, which every boot would read and write into guest memory. A loader needs only program
// headers, so this keeps the ELF header, the loadable bytes and the notes (the PVH entry point is a
// note), leaves out symbols and section headers, and leaves every page that is nothing but filling
// out of the file by splitting the segment around it. Guest memory is zero where nothing is loaded:
// a page of int3 that is never executed becomes a page of zeros that is never executed.
//
// Loaders in mind: rust-vmm's linux-loader, QEMU, Firecracker, Cloud Hypervisor. All of them place
// segments by p_paddr and take any number of them.

#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 4096, MAX_SEGMENTS = 512, MIN_GAP_PAGES = 4 };

static void fail(const char *what, const char *path) {
    fprintf(stderr, "pack-elf: %s: %s\n", path, what);
    exit(1);
}

// A page that a loader may leave out: all zero or, in code, all int3.
static int is_filling(const unsigned char *page, int is_code) {
    return (page[0] == 0x00 || (is_code && page[0] == 0xcc)) && !memcmp(page, page + 1, PAGE - 1);
}

int main(int argc, char **argv) {
    if (argc != 3) fail("usage: pack-elf VMLINUX OUTPUT", "arguments");

    FILE *in = fopen(argv[1], "rb");
    if (!in) fail("cannot be opened", argv[1]);
    fseek(in, 0, SEEK_END);
    size_t size = (size_t)ftell(in);
    rewind(in);
    unsigned char *image = malloc(size ? size : 1);
    if (!image || fread(image, 1, size, in) != size) fail("cannot be read", argv[1]);
    fclose(in);

    Elf64_Ehdr header;
    if (size < sizeof header) fail("is not an ELF file", argv[1]);
    memcpy(&header, image, sizeof header);
    if (memcmp(header.e_ident, ELFMAG, SELFMAG) || header.e_ident[EI_CLASS] != ELFCLASS64 ||
        header.e_machine != EM_X86_64 || header.e_phentsize != sizeof(Elf64_Phdr) ||
        header.e_phoff > size || header.e_phnum > (size - header.e_phoff) / sizeof(Elf64_Phdr))
        fail("is not an x86-64 ELF file with program headers", argv[1]);

    // `piece[i]` is a program header of the output whose p_offset still says where its bytes are in
    // the input.
    static Elf64_Phdr piece[MAX_SEGMENTS];
    size_t pieces = 0;
    for (size_t i = 0; i < header.e_phnum; i++) {
        Elf64_Phdr segment;
        memcpy(&segment, image + header.e_phoff + i * sizeof segment, sizeof segment);
        if (segment.p_type != PT_LOAD && segment.p_type != PT_NOTE) continue;
        if (segment.p_offset > size || segment.p_filesz > size - segment.p_offset)
            fail("has a segment outside the file", argv[1]);
        if (segment.p_type == PT_NOTE) {
            if (pieces == MAX_SEGMENTS) fail("has too many segments", argv[1]);
            piece[pieces++] = segment;
            continue;
        }

        // Runs of kept bytes, cut where at least MIN_GAP_PAGES pages of filling begin.
        int is_code = (segment.p_flags & (PF_X | PF_W)) == PF_X;
        size_t at = 0;
        while (at < segment.p_filesz) {
            const unsigned char *bytes = image + segment.p_offset;
            while (at + PAGE <= segment.p_filesz && is_filling(bytes + at, is_code)) at += PAGE;
            size_t end = at, gap = 0, cursor = at;
            while (cursor < segment.p_filesz && gap < MIN_GAP_PAGES) {
                size_t step = segment.p_filesz - cursor < PAGE ? segment.p_filesz - cursor : PAGE;
                int filling = step == PAGE && is_filling(bytes + cursor, is_code);
                cursor += step;
                gap = filling ? gap + 1 : 0;
                if (!filling) end = cursor;
            }
            if (end == at) break;  // nothing but filling was left
            if (pieces == MAX_SEGMENTS) fail("has too many segments", argv[1]);
            Elf64_Phdr *out = &piece[pieces++];
            *out = segment;
            out->p_offset += at;
            out->p_vaddr += at;
            out->p_paddr += at;
            out->p_filesz = out->p_memsz = end - at;
            out->p_align = PAGE;
            at = end;
        }
        // What follows the last kept byte (bss) belongs to the last piece.
        if (pieces && piece[pieces - 1].p_type == PT_LOAD &&
            piece[pieces - 1].p_paddr >= segment.p_paddr)
            piece[pieces - 1].p_memsz = segment.p_paddr + segment.p_memsz - piece[pieces - 1].p_paddr;
    }

    FILE *out = fopen(argv[2], "wb");
    if (!out) fail("cannot be created", argv[2]);
    Elf64_Ehdr packed = header;
    packed.e_phoff = sizeof packed;
    packed.e_phnum = (Elf64_Half)pieces;
    packed.e_shoff = 0;
    packed.e_shentsize = 0;
    packed.e_shnum = 0;
    packed.e_shstrndx = SHN_UNDEF;

    // Loadable pieces start at a multiple of the page size plus their address's offset in its page,
    // as ELF wants it; notes lie inside one of them or, if not, are copied after them.
    Elf64_Phdr placed[MAX_SEGMENTS];
    size_t offset = sizeof packed + pieces * sizeof *piece;
    for (size_t i = 0; i < pieces; i++) {
        placed[i] = piece[i];
        if (piece[i].p_type == PT_NOTE) {
            offset = (offset + 7) & ~(size_t)7;
        } else {
            size_t want = piece[i].p_vaddr % PAGE;
            offset = (offset + PAGE - 1 - want) / PAGE * PAGE + want;
        }
        placed[i].p_offset = offset;
        offset += piece[i].p_filesz;
    }

    int ok = fwrite(&packed, sizeof packed, 1, out) == 1 &&
             fwrite(placed, sizeof *placed, pieces, out) == pieces;
    for (size_t i = 0; ok && i < pieces; i++) {
        ok = !fseek(out, (long)placed[i].p_offset, SEEK_SET) &&
             fwrite(image + piece[i].p_offset, 1, piece[i].p_filesz, out) == piece[i].p_filesz;
    }
    if (fclose(out) || !ok) fail("cannot be written (is the disk full?)", argv[2]);
    return 0;
}
