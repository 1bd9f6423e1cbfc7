#!/bin/bash
# Perl's core: expressions, sorting, packing, forks and pipes, signals and alarms, sockets, threads, big numbers, digests, time.
set -eu
perl -e 'printf "perl %vd\n", $^V'
cat >/tmp/all.pl <<'P'
use strict; use warnings;
use Test::More;
use Digest::SHA qw(sha256_hex); use MIME::Base64; use Math::BigInt; use Time::HiRes qw(time sleep alarm);
use IO::Socket::INET; use IO::Select; use File::Temp qw(tempdir); use File::Find; use Storable qw(dclone);
use POSIX qw(:sys_wait_h strftime mktime); use Encode; use Socket; use Sys::Hostname; use threads; use threads::shared;
use IPC::Open3; use Fcntl qw(:flock);

is(join(',', sort { $a <=> $b } map { $_ * 7 % 10 } 0 .. 9), '0,1,2,3,4,5,6,7,8,9', 'sort');
my %count; $count{$_}++ for 'the cat and the dog and the bird' =~ /\w+/g;
is($count{the}, 3, 'expressions');
is_deeply([unpack 'N n C a3', pack 'N n C a3', 1, 2, 3, 'abc'], [1, 2, 3, 'abc'], 'pack');
is(Math::BigInt->new(2)->bpow(200)->bstr, '1606938044258990275541962092341162602522202993782792835301376', 'big numbers');
is(sha256_hex('abc'), 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad', 'digest');
is(decode_base64(encode_base64("\0\xff" x 99)), "\0\xff" x 99, 'base64');
is(length(decode('UTF-8', "\xc3\xa9")), 1, 'UTF-8');
is_deeply(dclone({ a => [1, { b => 2 }] }), { a => [1, { b => 2 }] }, 'storable');

my @children;
for my $n (1 .. 10) { my $pid = fork // die "fork: $!"; exit $n unless $pid; push @children, $pid; }
my $total = 0;
for (@children) { waitpid $_, 0; $total += WEXITSTATUS($?); }
is($total, 55, 'children');
is(scalar(`echo out; exit 3`), "out\n", 'backticks');
is($? >> 8, 3, 'their status');
my $pid = open3(my $in, my $out, undef, 'tr', 'a-z', 'A-Z');
print $in "hello\n"; close $in; is(<$out>, "HELLO\n", 'open3'); waitpid $pid, 0;

my $caught = 0;
local $SIG{USR1} = sub { $caught++ };
kill USR1 => $$ for 1 .. 3;
is($caught, 3, 'signals');
my $begun = time;
eval { local $SIG{ALRM} = sub { die "alarm\n" }; alarm 0.2; sleep 10; };
is($@, "alarm\n", 'alarm');
cmp_ok(time - $begun, '>=', 0.19, 'no sooner');

my $server = IO::Socket::INET->new(Listen => 5, LocalAddr => '127.0.0.1') or die "listen: $!";
unless (my $client = fork) {
    my $socket = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $server->sockport) or exit 1;
    print $socket "line $_\n" for 1 .. 1000;
    exit 0;
}
my $connection = $server->accept; my $lines = 0; $lines++ while <$connection>; wait;
is($lines, 1000, 'sockets');
is(inet_ntoa(scalar gethostbyname 'localhost'), '127.0.0.1', 'localhost');
ok(defined gethostbyname(hostname), 'own name');

my $shared :shared = 0;
$_->join for map { threads->create(sub { for (1 .. 100) { lock $shared; $shared++ } }) } 1 .. 5;
is($shared, 500, 'threads');

my $directory = tempdir(CLEANUP => 1);
for (1 .. 50) { open my $file, '>', "$directory/$_" or die; print $file 'x' x $_; }
my $size = 0; find(sub { $size += -s if -f }, $directory);
is($size, 1275, 'files');
open my $lock, '>', "$directory/lock"; ok(flock($lock, LOCK_EX | LOCK_NB), 'locks');
is(strftime('%Y-%m-%d', gmtime 86400 * 365), '1971-01-01', 'time');
cmp_ok(time, '>', 1_700_000_000, 'the clock is right');
done_testing;
P
perl /tmp/all.pl >/tmp/result 2>&1 || { grep -v '^ok' /tmp/result; exit 1; }
tail -n 1 /tmp/result
echo "perl: all well"
