package trailvec

import java.io.{ByteArrayInputStream, IOException}
import java.lang.{Boolean => JavaBoolean}
import java.nio.charset.StandardCharsets.UTF_8
import java.nio.file.FileAlreadyExistsException
import java.util.{Iterator => JavaIterator}

import scala.collection.JavaConverters._

import com.amazonaws.SdkBaseException
import com.amazonaws.services.s3.model.AmazonS3Exception
import io.delta.storage.S3SingleDriverLogStore
import org.apache.hadoop.conf.Configuration
import org.apache.hadoop.fs.Path
import org.apache.hadoop.fs.s3a.{S3AFileSystem, S3AUtils}

/** Delta's commits on S3, safe for any number of drivers and machines: a version's file is put with `If-None-Match: *`,
  * so that the store itself lets one writer have it, and tells all others that they lost. Delta then reads what the
  * winner wrote and commits behind it, as on a disk.
  *
  * Delta's own stores either keep a lock in the one JVM (S3SingleDriverLogStore, the default: a second driver's
  * commit silently takes the place of the first's) or a DynamoDB table beside the bucket.
  */
class ConditionalPutLogStore(initial: Configuration) extends S3SingleDriverLogStore(initial) {
  import ConditionalPutLogStore._

  override def write(path: Path, actions: JavaIterator[String], overwrite: JavaBoolean, conf: Configuration): Unit =
    path.getFileSystem(conf) match {
      case _ if overwrite => super.write(path, actions, overwrite, conf)
      case store: S3AFileSystem =>
        putIfAbsent(store, path, actions.asScala.map(_ + "\n").mkString.getBytes(UTF_8), Attempts)
      case other => throw new IOException(s"$path: ${other.getClass.getName} has no conditional writes, s3a:// has")
    }

  private def putIfAbsent(store: S3AFileSystem, path: Path, content: Array[Byte], attempts: Int): Unit = {
    val requests = store.getRequestFactory // with the encryption and the access list that the settings ask for
    val metadata = requests.newObjectMetadata(content.length.toLong)
    val request = requests.newPutObjectRequest(store.pathToKey(path), metadata, new ByteArrayInputStream(content))
    request.putCustomRequestHeader("If-None-Match", "*")
    try store.getAmazonS3ClientForTesting("a conditional put, which S3A has from Hadoop 3.4 on").putObject(request)
    catch {
      // The client tries again where an answer was lost: what it meets then is its own first attempt.
      case taken: AmazonS3Exception if taken.getStatusCode == Taken =>
        if (!content.sameElements(read(store, path))) throw new FileAlreadyExistsException(path.toString)
      // Another write to the same key was going on at that moment: S3 asks for another try.
      case race: AmazonS3Exception if race.getStatusCode == Race && attempts > 1 =>
        putIfAbsent(store, path, content, attempts - 1)
      case error: SdkBaseException => throw S3AUtils.translateException("conditional put", path.toString, error)
    }
  }

  private def read(store: S3AFileSystem, path: Path): Array[Byte] = {
    val content = new Array[Byte](store.getFileStatus(path).getLen.toInt)
    val stream = store.open(path)
    try stream.readFully(0, content)
    finally stream.close()
    content
  }
}

private object ConditionalPutLogStore {
  val Taken = 412
  val Race = 409
  val Attempts = 10
}
