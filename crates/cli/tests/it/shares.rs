//! Folders of the host in Debian guests.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::guest::{Debian, Ran, run};
use crate::kept::Cloud;

const BIG: usize = 40 << 20;
const SMALL: usize = 1500;

/// Writes to a file through a shared mapping and reads another one through it.
const MMAP: &str = r#"perl -e '
use Fcntl;
sub map_file { my ($path, $prot, $len) = @_;
    sysopen(my $file, $path, $prot & 2 ? O_RDWR : O_RDONLY) or die "$path: $!";
    my $at = syscall(9, 0, $len, $prot, 1, fileno($file), 0);
    die "mmap: $!" if $at == -1;
    return $at }
my $from = map_file("/s/host.txt", 1, 4096);
print unpack("P9", pack("Q", $from)), "\n";
my $to = map_file("/s/mapped", 3, 8192);
pipe(my $read, my $write);
syswrite($write, "through a mapping");
syscall(0, fileno($read), $to + 4090, 17) == 17 or die "copy: $!";
syscall(26, $to, 8192, 4) == 0 or die "msync: $!";'"#;

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn lines(ran: &Ran) -> Vec<String> {
    ran.text().lines().map(str::to_owned).collect()
}

/// The word for a share.
fn share(host: &Path, guest: &str) -> String {
    format!("{}:{guest}", host.display())
}

#[test]
fn files_go_both_ways() {
    let Some(debian) = Debian::take() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("host.txt"), "from host\n").unwrap();
    fs::write(at("mapped"), vec![b'.'; 8192]).unwrap();
    fs::write(at("ünï → 名前"), "name").unwrap();
    fs::create_dir(at("sub")).unwrap();
    let big: Vec<u8> =
        (0..BIG as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(at("big"), &big).unwrap();
    let script = format!(
        "set -e; cd /s; cat host.txt; cat 'ünï → 名前'; echo
         umask 022; echo guest > guest.txt; chmod 640 guest.txt; mkdir -m 711 made; echo x > made/x
         mv made/x made/y; ln -s ../host.txt made/link; cat made/link; ln guest.txt hard; stat -c %h hard
         echo more >> guest.txt; mv guest.txt sub/moved; rmdir made 2>/dev/null || echo full
         sha256sum big | cut -d' ' -f1; cp big big2; sha256sum big2 | cut -d' ' -f1; cmp big big2
         truncate -s 5000 big; wc -c < big; touch -d @1000000000 sub/moved
         i=0; while [ $i -lt {SMALL} ]; do echo $i > sub/f$i; i=$((i+1)); done
         ls sub | wc -l; cat sub/f* | wc -l; rm sub/f?
         cp /bin/true sub/true; sub/true && echo runs
         {MMAP}
         mkfifo sub/pipe; (echo piped > sub/pipe &) ; cat sub/pipe
         exec 5> gone; rm gone; echo still >&5; dd if=host.txt of=holes seek=1000 2>/dev/null
         flock sub echo locked; df -P /s | tail -1 | cut -d' ' -f1; id -u; stat -c %u host.txt"
    );
    let ran = debian.shell(&["--share", &share(dir.path(), "/s")], &script);
    ran.check(0);
    assert_eq!(ran.stderr, "");
    let owner = fs::metadata(at("host.txt")).unwrap().uid().to_string();
    let count = (SMALL + 1).to_string();
    let expected = [
        "from host",
        "name",
        "from host",
        "2",
        "full",
        &sum(&big),
        &sum(&big),
        "5000",
        &count,
        &SMALL.to_string(),
        "runs",
        "from host",
        "piped",
        "locked",
        "share0",
        "0",
        &owner,
    ];
    assert_eq!(lines(&ran), expected, "{}", ran.text());
    assert_eq!(fs::read(at("sub/moved")).unwrap(), b"guest\nmore\n");
    let moved = fs::metadata(at("sub/moved")).unwrap();
    assert_eq!((moved.mode() & 0o7777, moved.nlink(), moved.mtime()), (0o640, 2, 1_000_000_000));
    assert_eq!(fs::metadata(at("made")).unwrap().permissions().mode() & 0o7777, 0o711);
    assert_eq!(fs::read_link(at("made/link")).unwrap(), Path::new("../host.txt"));
    assert_eq!(fs::read(at("made/y")).unwrap(), b"x\n");
    assert!(fs::read(at("big2")).unwrap() == big);
    assert_eq!(fs::read(at("sub/f1499")).unwrap(), b"1499\n");
    assert!(!at("sub/f7").exists() && !at("gone").exists());
    assert_eq!(&fs::read(at("mapped")).unwrap()[4090..4107], b"through a mapping");
    assert_eq!(fs::metadata(at("holes")).unwrap().len(), 512_010);
}

#[test]
fn a_guest_does_not_get_out_of_its_folder() {
    let Some(debian) = Debian::take() else { return };
    let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(outside.path().join("secret"), "secret").unwrap();
    fs::write(dir.path().join("file"), "file\n").unwrap();
    fs::write(dir.path().join("..x"), "").unwrap();
    symlink(outside.path(), dir.path().join("out")).unwrap();
    symlink("../../../../../../etc/hostname", dir.path().join("up")).unwrap();
    symlink("/etc/hostname", dir.path().join("name")).unwrap();
    let out = outside.path().display();
    // Links lead to where they lead in the guest, whoever made them.
    let script = format!(
        "cd /s; hostname > /etc/hostname; cat name up; ls out/ 2>/dev/null || echo no; \
         ln -s / root; ls root | grep -c '^proc$'; mkdir -p {out}; echo mine > {out}/secret; cat out/secret; \
         echo changed > name; cat /etc/hostname; ls -d ..; cd ..; pwd; \
         mknod /s/null c 1 3 2>&1 | grep -o 'not permitted'; ls /s"
    );
    let ran = debian.shell(&["--name", "inside", "--share", &share(dir.path(), "/s")], &script);
    ran.check(0);
    let text = ran.text();
    assert!(
        text.starts_with("inside\ninside\nno\n1\nmine\nchanged\n..\n/\n"),
        "{text}\n{}",
        ran.stderr
    );
    assert!(text.contains("not permitted\n"), "{text}");
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    assert_ne!(fs::read("/etc/hostname").unwrap_or_default(), b"changed\n");
    assert!(!dir.path().join("null").exists());
}

#[test]
fn a_folder_that_is_read_only_stays_as_it_is() {
    let Some(debian) = Debian::take() else { return };
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("a b")).unwrap();
    fs::write(dir.path().join("a b/file"), "kept").unwrap();
    let word = format!("{}:/data/with space:ro", dir.path().join("a b").display());
    // Mounted anew for writing, it is the host that refuses.
    let script = "cd '/data/with space'; cat file; echo; touch new 2>&1 | grep -o 'Read-only.*'
                  mount -o remount,rw '/data/with space' && grep -c 'share0.*virtiofs rw' /proc/mounts
                  for c in 'touch new' 'rm file' 'chmod 777 file' 'sh -c \"echo x >> file\"' 'mv file g' \
                           'mkdir d' 'ln file h' 'ln -s x y' 'touch file'; do
                      eval $c 2>&1 | grep -o 'Read-only file system'; done; cat file";
    let ran = debian.shell(&["--share", &word], script);
    ran.check(0);
    let refused = "Read-only file system\n";
    assert_eq!(
        ran.text(),
        format!("kept\n{refused}1\n{}kept", refused.repeat(9)),
        "{}",
        ran.stderr
    );
    assert_eq!(fs::read_dir(dir.path().join("a b")).unwrap().count(), 1);
}

#[test]
fn kept_machines_share_one_folder() {
    let Some(debian) = Debian::take() else { return };
    let cloud = debian.cloud();
    let dir = cloud.root().join("shared folder");
    let other = cloud.root().join("other");
    fs::create_dir(&dir).unwrap();
    fs::create_dir(&other).unwrap();
    fs::write(other.join("o"), "other\n").unwrap();
    let vm = |words: &[&str]| run(cloud.command("vm").args(words).current_dir(cloud.root()), b"");
    let create = |name: &str, how: &str| {
        // The first is relative to where the command runs.
        let (first, second) = (format!("shared folder:/srv/s{how}"), share(&other, "/o:ro"));
        let words =
            ["create", "--net", "none", "--share", &first, "--share", &second, name, "debian"];
        vm(&words).check(0);
    };
    create("a", "");
    create("b", "");
    let shares = &cloud.inspect("a")["config"]["shares"];
    let expected = serde_json::json!([
        { "host": dir, "guest": "/srv/s" },
        { "host": other, "guest": "/o", "read_only": true },
    ]);
    assert_eq!(*shares, expected);
    let toml = fs::read_to_string(cloud.root().join("machines/a/vm.toml")).unwrap();
    assert!(toml.contains("[[machine.shares]]"), "{toml}");
    cloud.ok("vm start a b");
    let sh = |name: &str, script: &str| {
        let ran = vm(&["exec", name, "sh", "-c", script]);
        ran.check(0);
        assert_eq!(ran.stderr, "", "{script}");
        ran.text()
    };
    // The process is confined: what it may do in the folders is all there.
    let all = "cd /srv/s; echo a > f; mkdir d; mv f d/g; ln d/g h; ln -s h l; chmod 600 h; chown 7:8 h || true
               truncate -s 10 h; cat l | wc -c; mkfifo p; rm p; cp d/g copy; touch -d @5 copy; sync
               perl -e 'mkdir \"many\"; for (1..300) { open F, \">many/$_\"; print F $_ }'; ls many | wc -l
               rm -r d many; ls
               (umask 002; echo > x; mkdir y; stat -c %a x y; rm -r x y); mkdir -m 777 w
               su nobody -s /bin/sh -c 'echo > w/n' && stat -c %u w/n; rm -r w; cat /o/o; touch /o/x 2>/dev/null || echo refused";
    // Root makes files that are others'; everybody else makes their own.
    let me = rustix::process::geteuid();
    let nobody = if me.is_root() { 65534 } else { me.as_raw() };
    let expected = format!("10\n300\ncopy\nh\nl\n664\n775\n{nobody}\nother\nrefused\n");
    assert_eq!(sh("a", all), expected);
    let log = fs::read_to_string(cloud.root().join("machines/a/vmm.log")).unwrap_or_default();
    assert!(!log.contains("umask"), "{log}");
    assert_eq!(sh("b", "cat /srv/s/h | wc -c; echo from b > /srv/s/b"), "10\n");
    assert_eq!(sh("a", "cat /srv/s/b"), "from b\n");
    // What one changes the other sees within a second.
    fs::write(dir.join("b"), "from the host\n").unwrap();
    assert_eq!(sh("a", "sleep 1.1; cat /srv/s/b"), "from the host\n");
    cloud.ok("vm pause a");
    fs::write(dir.join("b"), "while it stood still\n").unwrap();
    cloud.ok("vm unpause a");
    assert_eq!(sh("a", "sleep 1.1; cat /srv/s/b"), "while it stood still\n");
    // Memory would not fit the folder's files.
    for words in ["suspend a", "snapshot a", "clone --running a c"] {
        cloud.fails(&format!("vm {words}"), &["a", "shared folders", "stop it first"]);
    }
    assert_eq!(cloud.names(), ["a", "b"]);
    assert_eq!(sh("a", "cat /o/o"), "other\n", "it goes on");
    cloud.ok("vm snapshot --disk-only --tag disks a");
    cloud.ok("vm stop a");
    cloud.ok("vm snapshot --tag stopped a");
    cloud.ok("vm restore a stopped");
    cloud.ok("vm clone a c");
    cloud.ok("vm start c");
    assert_eq!(sh("c", "cat /o/o; rm /srv/s/copy"), "other\n");
    assert!(!dir.join("copy").exists());
    cloud.ok("vm stop c");
    let ran = vm(&["export", "a", "-o", "a.berth"]);
    ran.check(0);
    assert!(ran.stderr.contains("not in what is exported"), "{}", ran.stderr);
    vm(&["import", "--name", "d", "a.berth"]).check(0);
    assert!(cloud.inspect("d")["config"]["shares"].is_null());
    cloud.ok("vm rm -f c d");
    fs::rename(&other, cloud.root().join("moved")).unwrap();
    cloud.fails("vm start a", &["other", "a shared folder", "No such file"]);
}

/// More files than the process may have open, and folders above them that are renamed: what was closed
/// was once taken for gone.
#[test]
fn few_descriptors_are_enough_for_many_files() {
    let Some(debian) = Debian::take() else { return };
    let dir = tempfile::tempdir().unwrap();
    let script =
        "set -e; cd /s; cp -a /usr/share/doc x; diff -r /usr/share/doc x; mkdir -p q/r; cd x
                  mv ../x ../y; cat */copyright > /tmp/a; mv ../y ../q/r/z; cd /s
                  cat /usr/share/doc/*/copyright | cmp - /tmp/a; diff -r /usr/share/doc q/r/z
                  ls -lR q/r/z > /tmp/a; ls -lR q/r/z | cmp - /tmp/a; rm -r q; ls; echo done";
    let word = share(dir.path(), "/s");
    let guest = debian.command(&["--net", "none", "--share", &word], &["sh", "-c", script]);
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "ulimit -n 800; exec \"$@\"", "sh"]).arg(guest.get_program());
    let ran = run(command.args(guest.get_args()), b"");
    assert_eq!((ran.check(0).text().as_str(), ran.stderr.as_str()), ("done\n", ""));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_folder_that_cannot_be_mounted_stops_the_guest() {
    let Some(debian) = Debian::take() else { return };
    let dir = tempfile::tempdir().unwrap();
    let ran = debian.shell(&["--share", &share(dir.path(), "/etc/passwd/x")], "echo never");
    assert_eq!(ran.text(), "");
    ran.check(1);
    let parts = ["the shared folder share0", "/etc/passwd/x", "Not a directory"];
    assert!(parts.iter().all(|part| ran.stderr.contains(part)), "{}", ran.stderr);
}

#[test]
fn a_guest_with_its_own_kernel_mounts_by_tag() {
    let Some(debian) = Debian::take() else { return };
    // Makes the initramfs.
    debian.shell(&["--net", "none"], "true").check(0);
    let dir = tempfile::tempdir().unwrap();
    let init = dir.path().join("init");
    fs::write(
        &init,
        "#!/bin/sh\ncat /proc/cmdline > /mnt/out; sync; echo o > /proc/sysrq-trigger; sleep 60\n",
    )
    .unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    let initramfs = fs::read_dir(debian.image.initramfs_directory()).unwrap();
    let initrd = initramfs.map(|entry| entry.unwrap().path()).next().unwrap();
    let mut command = crate::guest::berth(&["vm", "run", "--serial", "none", "--append"]);
    command.arg("berth.root=/dev/vda berth.share=data=/mnt berth.init=/mnt/init");
    command.arg("--kernel").arg(debian.image.kernel()).arg("--initrd").arg(initrd);
    command.arg("--disk").arg(format!("{},ro", debian.image.root_disk().display()));
    command.arg("--share").arg(share(dir.path(), "data"));
    run(&mut command, b"").check(0);
    let line = fs::read_to_string(dir.path().join("out")).unwrap();
    assert!(line.contains("berth.share=data=/mnt"), "{line}");
}

#[test]
fn shares_that_cannot_be_are_refused() {
    let cloud = Cloud::new();
    let kernel = cloud.kernel("k.elf", &[0xf4]);
    let file = cloud.root().join("file");
    fs::write(&file, "").unwrap();
    let (root, file) = (cloud.root().display(), file.display());
    let create = |share: String, parts: &[&str]| {
        cloud.fails(&format!("vm create --kernel {kernel} --share {share} a"), parts);
    };
    create(format!("{root}/no:tag"), &["/no", "cannot share", "No such file"]);
    create(format!("{file}:tag"), &["file", "no folder"]);
    create(format!("{root}:/a"), &["/a", "HOSTDIR:TAG"]);
    create(format!("{root}:a --share {root}:a"), &["two folders"]);
    assert!(cloud.names().is_empty());
    let ran = cloud.run("vm create --share nowhere a debian");
    ran.check(2);
    assert!(ran.stderr.contains("HOSTDIR:GUESTDIR"), "{}", ran.stderr);
    // A tag is enough for a guest that is no image's.
    cloud.ok(&format!("vm create --kernel {kernel} --memory 64M --share {root}:tag:ro a"));
    cloud.ok("vm start a");
    cloud.ok("vm kill a");
}
