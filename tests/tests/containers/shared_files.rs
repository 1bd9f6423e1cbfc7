//! What files of shared directories can have and be: extended attributes, ACLs, capabilities, and files without a name.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::XattrFlags;

use crate::told;

/// What scripts below call: system calls that Perl has no functions for. Each prints what it was about and what came of it.
const CALLS: &str = r#"
    use strict; use Fcntl; $| = 1;
    sub say { my ($what, $result) = @_; print "$what: ", $result < 0 ? $! : "done", "\n" }
    sub set { my ($path, $name, $value) = @_; say("set $name", syscall(188, $path, $name, $value, length $value, 0)) }
    sub get {
        my ($path, $name) = @_; my $value = "\0" x 4096; my $length = syscall(191, $path, $name, $value, 4096);
        print "get $name: ", $length < 0 ? $! : unpack("H*", substr($value, 0, $length)), "\n"
    }
    sub names {
        my ($path) = @_; my $names = "\0" x 4096; my $length = syscall(194, $path, $names, 4096);
        print "names: ", $length < 0 ? $! : join(" ", sort split /\0/, substr($names, 0, $length)), "\n"
    }
    sub make { open(my $file, ">", $_[0]) or die "$_[0]: $!"; close $file }
    # As this user and group.
    sub as {
        my ($user, $group, $do) = @_; my $child = fork;
        if ($child == 0) { $( = $group; $) = "$group $group"; $< = $> = $user; $do->(); exit 0 }
        waitpid $child, 0
    }
    # Owner rw, user 1234 r, owning group nothing, mask r, others nothing.
    my $acl = pack "V(vvV)5", 2, 1, 6, 0xffffffff, 2, 4, 1234, 4, 0, 0xffffffff, 16, 4, 0xffffffff, 32, 0, 0xffffffff;
    # CAP_CHOWN, permitted and effective.
    my $capability = pack "V5", 0x02000001, 1, 0, 0, 0;
    # Names and numbers are passed on as variables, for a system call might write to them.
    my ($access, $default, $security) = qw(system.posix_acl_access system.posix_acl_default security.capability);
"#;
const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
const CAPABILITY: &str = "security.capability";
/// The ACL of the scripts, as its bytes are.
const ACL: &str = "0200000001000600ffffffff02000400d204000004000000ffffffff10000400ffffffff20000000ffffffff";
const CHOWN: &str = "0100000201000000000000000000000000000000";

/// What a container prints that has a directory of the host as `/data` and runs this script.
fn perl(host: &Path, script: &str) -> Vec<String> {
    let volume = format!("{}:/data", host.display());
    let script = format!("{CALLS}{script}");
    told(&["run", "--rm", "-v", &volume, "debian", "perl", "-e", &script])
        .lines()
        .map(str::to_owned)
        .collect()
}

/// An extended attribute of a file of the host, in hexadecimal digits.
fn attribute(path: &Path, name: &str) -> Option<String> {
    let mut value = vec![0u8; 4096];
    let length = rustix::fs::getxattr(path, name, value.as_mut_slice()).ok()?;
    Some(value[..length].iter().map(|byte| format!("{byte:02x}")).collect())
}

#[test]
fn attributes_are_those_of_the_hosts_file_and_trusted_ones_are_not_the_containers() {
    let host = tempfile::tempdir().unwrap();
    let file = host.path().join("file");
    fs::write(&file, "text").unwrap();
    for name in ["user.host", "trusted.host"] {
        rustix::fs::setxattr(&file, name, b"hi", XattrFlags::empty()).unwrap();
    }
    let script = r#"
        my $file = "/data/file";
        set($file, $_ . "", "hi") for qw(user.mine trusted.mine security.mine);
        set($file, $security, $capability); set($file, $access, $acl);
        get($file, $_ . "") for qw(user.host trusted.host user.mine);
        get($file, $security); get($file, $access); names($file);
        say("remove", syscall(197, $file, my $name = "user.host"));
    "#;
    let expected = [
        "set user.mine: done",
        "set trusted.mine: Operation not permitted",
        "set security.mine: Operation not permitted",
        "set security.capability: done",
        "set system.posix_acl_access: done",
        "get user.host: 6869",
        "get trusted.host: No data available",
        "get user.mine: 6869",
        &format!("get {CAPABILITY}: {CHOWN}"),
        &format!("get {ACCESS}: {ACL}"),
        "names: security.capability system.posix_acl_access user.host user.mine",
        "remove: done",
    ];
    assert_eq!(perl(host.path(), script), expected);
    assert_eq!(attribute(&file, "user.mine").unwrap(), "6869");
    assert_eq!(attribute(&file, "user.host"), None);
    assert_eq!(attribute(&file, "trusted.host").unwrap(), "6869");
    assert_eq!(attribute(&file, CAPABILITY).unwrap(), CHOWN);
    assert_eq!(attribute(&file, ACCESS).unwrap(), ACL);
}

#[test]
fn acls_are_kept_and_inherited_but_a_container_goes_by_the_mode_alone() {
    let host = tempfile::tempdir().unwrap();
    fs::set_permissions(host.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let script = r#"
        my ($file, $directory, $made) = qw(/data/file /data/directory /data/directory/made);
        make($file); chown 1000, 2000, $file; set($file, $access, $acl);
        printf "mode: %o\n", (stat $file)[2] & 07777;
        mkdir $directory; set($directory, $default, $acl); make($made); get($made, $access);
        my $read = sub { open(my $handle, "<", $file); say("open", $handle && defined fileno($handle) ? 0 : -1) };
        as(1234, 1234, $read); as(3000, 2000, $read); as(3000, 3000, $read);
        chmod 0600, $file; get($file, $access);
    "#;
    let expected = [
        "set system.posix_acl_access: done",
        // The mask is what the mode says of the group.
        "mode: 640",
        "set system.posix_acl_default: done",
        &format!("get {ACCESS}: {ACL}"),
        // User 1234 may read by the ACL; the owning group may not, but has in the mode what is the mask.
        "open: Permission denied",
        "open: done",
        "open: Permission denied",
        &format!("get {ACCESS}: {}", ACL.replace("10000400", "10000000")),
    ];
    assert_eq!(perl(host.path(), script), expected);
    assert_eq!(attribute(&host.path().join("directory"), DEFAULT).unwrap(), ACL);
    let made = host.path().join("directory/made");
    assert_eq!(fs::metadata(&made).unwrap().mode() & 0o7777, 0o640);
    assert_eq!(attribute(&made, ACCESS).unwrap(), ACL);
}

#[test]
fn capabilities_and_set_id_bits_are_kept_until_a_file_is_written_and_give_nothing_to_who_executes_it() {
    let host = tempfile::tempdir().unwrap();
    fs::set_permissions(host.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let script = r#"
        for my $where ("/data", "/opt") {
            system "cp /bin/chown $where/chown; cp /usr/bin/id $where/id; chmod 4755 $where/id; touch $where/mine; chown 1000 $where/mine";
            set(my $program = "$where/chown", $security, $capability);
            as(1000, 1000, sub {
                print "$where: ", system("$where/chown 0 $where/mine 2> /dev/null") ? "refused" : "given away", ", "; system "$where/id -u"
            });
        }
        my ($chown, $id) = qw(/data/written-chown /data/written-id);
        system "cp /data/chown $chown; cp /data/id $id; chmod 4777 $id"; set($chown, $security, $capability);
        my $write = sub { open(my $file, ">>", $_[0]) or die $!; print $file "more" };
        $write->($chown); get($chown, $security);
        $write->($id); printf "%o, written by root\n", (stat $id)[2] & 07777;
        as(1000, 1000, sub { $write->($id) }); printf "%o, written by another\n", (stat $id)[2] & 07777;
    "#;
    let expected = [
        "set security.capability: done",
        "/data: refused, 1000",
        "set security.capability: done",
        "/opt: given away, 0",
        "set security.capability: done",
        "get security.capability: No data available",
        "4777, written by root",
        "777, written by another",
    ];
    assert_eq!(perl(host.path(), script), expected);
    let program = host.path().join("chown");
    assert_eq!(attribute(&program, CAPABILITY).unwrap(), CHOWN);
    assert_eq!(
        fs::metadata(host.path().join("id")).unwrap().mode() & 0o7777,
        0o4755
    );
    let written = host.path().join("written-id");
    assert_eq!(fs::metadata(written).unwrap().mode() & 0o7777, 0o777);
}

#[test]
fn a_file_without_a_name_is_one_that_lost_it_and_gets_none() {
    let host = tempfile::tempdir().unwrap();
    let other = host.path().join("gone (deleted)");
    fs::write(&other, "another").unwrap();
    let script = r#"
        # O_TMPFILE
        say("without a name", sysopen(my $never, "/data", O_RDWR | 020200000, 0600) ? 0 : -1);
        open(my $file, "+>", "/data/gone") or die $!; unlink "/data/gone" or die $!;
        syswrite $file, "kept text"; truncate $file, 4; chmod 0640, $file; chown 1000, 2000, $file; utime 10, 20, $file;
        sysseek $file, 0, 0; sysread $file, my $text, 100; my @status = stat $file;
        printf "%s: %d links, mode %o, %d:%d, %d bytes, %d s\n", $text, $status[3], $status[2] & 07777, @status[4, 5, 7, 9];
        my ($number, $by, $name, $empty, $attribute, $value) = (fileno $file, "/proc/self/fd/" . fileno $file, "/data/again", "", "user.a", "b");
        say("name by its link", syscall(265, -100, $by, -100, $name, 0x400));
        say("name by its number", syscall(265, $number, $empty, -100, $name, 0x1000));
        say("attribute", syscall(190, $number, $attribute, $value, 1, 0));
    "#;
    let expected = [
        "without a name: Operation not supported",
        "kept: 0 links, mode 640, 1000:2000, 4 bytes, 20 s",
        "name by its link: No such file or directory",
        "name by its number: No such file or directory",
        "attribute: No such file or directory",
    ];
    assert_eq!(perl(host.path(), script), expected);
    assert_eq!(attribute(&other, "user.a"), None);
    assert_eq!(fs::metadata(&other).unwrap().nlink(), 1);
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 1);
}

#[test]
fn a_file_that_has_lost_the_name_it_was_found_by_gets_attributes_when_it_is_found_again() {
    let host = tempfile::tempdir().unwrap();
    let script = r#"
        make("/data/first"); link "/data/first", "/data/second" or die $!;
        my ($moved, $second, $name, $value) = ("/data/moved", "/data/second", "user.a", "b");
        set($second, $name, $value); unlink "/data/first" or die $!; set($second, $name, $value);
        rename $second, $moved or die $!; make("/data/third"); rename "/data/third", $second or die $!; set($second, $name, $value);
        open(my $memory, ">", "/proc/sys/vm/drop_caches") or die $!; print $memory "2"; close $memory; set($moved, $name, $value);
    "#;
    let expected = [
        "set user.a: done",
        "set user.a: No such file or directory",
        // A name that was changed is no name that was lost.
        "set user.a: done",
        "set user.a: done",
    ];
    assert_eq!(perl(host.path(), script), expected);
}
